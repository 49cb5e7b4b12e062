"The aggregator's pieces, its alternative layer, and one compilation for pictures of all shapes."
import pytest
import torch
import torch.nn.functional as F

from mllm_nb.connectors import sva
from mllm_nb.connectors.sva import SVAConfig, VisionSampler, Window, open_if_empty
from mllm_nb.vision.towers import Features, padding_mask

WIDTH = 32


def given(sides, views=2, cells=9, single=False, seed=0):
    torch.manual_seed(seed)
    queries = torch.randn(views, 1 if single else cells, WIDTH, requires_grad=True)
    context = torch.randn(views, 1, WIDTH, requires_grad=True)
    values = [torch.randn(views, cells, side ** 2, WIDTH, requires_grad=True) for side in sides]
    masks = open_if_empty([torch.rand(views, cells, side ** 2) > .4 for side in sides])
    return queries, context, values, masks


@pytest.mark.parametrize("sides, single", [((1, 3), False), ((2, 1, 4), True), ((3,), False), ((2, 2), True)])
def test_pieces_change_nothing(sides, single, monkeypatch):
    queries, context, values, masks = given(sides, single=single)
    sampler = VisionSampler(WIDTH, WIDTH, sides, WIDTH, 2)
    found = []
    for piece in (2 ** 20, 1, 2 * 2 * 9 * WIDTH):            # whole; a cell at a time; a few cells
        monkeypatch.setattr(sva, "PIECE", piece)
        result = sampler(queries, context, [Window(value, mask) for value, mask in zip(values, masks)])
        leaves = [queries, context, *values, *sampler.parameters()]
        found.append([result, *torch.autograd.grad(result.square().sum(), leaves)])
        with torch.no_grad():
            again = sampler(queries, context, [Window(value, mask) for value, mask in zip(values, masks)])
        torch.testing.assert_close(again, result, atol=1e-5, rtol=1e-5)
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, a.abs().max().item()), rtol=1e-4)


def by_hand(layer, query, context, tokens, masks):
    "The alternative layer for one cell, with nothing but vectors."
    asked = torch.cat([query, layer.proj_context(context)])
    hidden = layer.proj_in(asked)
    weights = layer.weight_mlp(asked).softmax(-1) if len(tokens) > 1 else torch.ones(1)
    total = hidden
    for number, (values, mask) in enumerate(zip(tokens, masks)):
        alone = getattr(layer, f"aggregate_{number}")["attention_layer"]
        if len(values) == 1:
            total = total + weights[number] * alone.linear_2(F.gelu(alone.linear_1(values[0])))
            continue
        values = values + getattr(layer, f"pos_embed_{number}")
        heads = [part.reshape(-1, 16, WIDTH // 16) for part in (alone.q_proj(hidden), alone.k_proj(values),
                                                                alone.v_proj(values))]
        scores = (heads[0] * heads[1]).sum(-1) / (WIDTH // 16) ** .5          # [window, heads]
        shares = scores.masked_fill(~mask[:, None], -torch.inf).softmax(0)
        total = total + weights[number] * alone.o_proj((shares[..., None] * heads[2]).sum(0).flatten())
    return query + layer.proj_out(layer.norm(total))


@pytest.mark.parametrize("sides", [(1, 2), (2,), (1,), (3, 1, 2)])
def test_the_separate_layer_by_hand(sides):
    queries, context, values, masks = given(sides, cells=4)
    sampler = VisionSampler(WIDTH, WIDTH, sides, WIDTH, 1, "sep")
    found = sampler(queries, context, [Window(value, mask) for value, mask in zip(values, masks)])
    for view in range(2):
        for cell in range(4):
            expected = by_hand(sampler.layers[0], queries[view, cell], context[view, 0],
                               [value[view, cell] for value in values], [mask[view, cell] for mask in masks])
            torch.testing.assert_close(found[view, cell], expected, atol=1e-5, rtol=1e-5)


def test_the_separate_layers_names_are_the_originals():
    names = {name for name, _ in VisionSampler(WIDTH, WIDTH, (1, 2), WIDTH, 1, "sep").named_parameters()}
    parts = {"proj_context.weight", "proj_in.weight", "proj_out.linear_1.weight", "proj_out.linear_2.weight",
             "norm.weight", "norm.bias", "weight_mlp.linear_1.weight", "weight_mlp.linear_2.weight", "pos_embed_1",
             "aggregate_0.attention_layer.linear_1.weight", "aggregate_0.attention_layer.linear_2.weight",
             "aggregate_1.attention_layer.o_proj.weight"}
    parts |= {f"aggregate_1.attention_layer.{one}_proj.{rest}" for one in "qkv"
              for rest in ("0.weight", "0.bias", "1.weight")}
    assert names == {f"layers.0.{part}" for part in parts}
    with pytest.raises(ValueError, match="found 'both', expected one of"):
        VisionSampler(WIDTH, WIDTH, (1,), WIDTH, 1, "both")


def test_one_compilation_serves_pictures_of_all_shapes():
    torch.manual_seed(0)
    config = SVAConfig((16, 64), WIDTH, 16, query_num_list=(16,), connector_depth=2)
    connector, graphs = config.build((12, 8), 24), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(coarse, fine, sizes):
        features = [Features(grid, padding_mask(grid, sizes)) for grid in (coarse, fine)]
        return connector(features).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=count, fullgraph=True)
    for size in [(100, 100), (200, 50), (50, 200), (1, 2000), (2000, 1), (3, 7), (640, 480)]:
        grids = torch.randn(2, 4, 4, 12), torch.randn(2, 8, 8, 8)
        sizes = torch.tensor([size, (33, 64)])
        found = compiled(*grids, sizes)
        torch.testing.assert_close(found, step(*grids, sizes))
        found.backward()
    torch._dynamo.reset()
    assert len(graphs) == 1
