"The aggregator: the fast way against the plain one, windows and masks, samplers inside both kinds of language models."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mllm_nb.connectors.sva import (SVAConfig, VisionSampler, Window, cut_windows, open_if_empty, pays,
                                    plain_features, sampled)
from mllm_nb.language.decoder import DecoderConfig, TransformersDecoder
from mllm_nb.language.generate import generate
from mllm_nb.mllm import MLLM, MLLMConfig
from mllm_nb.papers.cambrian import Elsewhere
from mllm_nb.vision.towers import Features, padding_mask

WIDTH = 32
SMALL = dict(vocab_size=60, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def both_ways(sampler: VisionSampler, inputs: list[torch.Tensor], run) -> list[list[torch.Tensor]]:
    "Output and all gradients, the fast way and the plain one."
    found = []
    for path in ("fast", "plain"):
        for layer in sampler.layers:
            layer.path = path
        result = run(sampler)
        wanted = [*inputs, *sampler.parameters()]
        found.append([result, *torch.autograd.grad(result.square().sum(), wanted)])
    return found


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 2), st.integers(1, 5), st.booleans(),
       st.integers(0, 2**31), st.integers(1, 2))
@settings(max_examples=25)
def test_the_fast_way_is_the_plain_way(sides, views, cells, single, seed, depth):
    torch.manual_seed(seed)
    sampler = VisionSampler(WIDTH, WIDTH, sides, WIDTH, depth)
    queries = torch.randn(views, 1 if single else cells, WIDTH, requires_grad=True)
    context = torch.randn(views, 1, WIDTH, requires_grad=True)
    values = [torch.randn(views, cells, side ** 2, WIDTH, requires_grad=True) for side in sides]
    masks = open_if_empty([torch.rand(views, cells, side ** 2) > .3 for side in sides])
    run = lambda one: one(queries, context, [Window(value, mask) for value, mask in zip(values, masks)])  # noqa: E731
    fast, plain = both_ways(sampler, [queries, context, *values], run)
    for a, b in zip(fast, plain):
        size = max(1.0, b.square().mean().sqrt().item())
        assert (a.expand_as(b) - b).abs().max() < 1e-4 * size


def aggregator(**changes):
    torch.manual_seed(0)
    settings = dict(vision_hidden_size=WIDTH, image_token_len=16, query_num_list=(16,)) | changes
    return SVAConfig((16, 64), **settings).build((12, 8), 24)


def grids(seed: int = 0, views: int = 1):
    torch.manual_seed(seed)
    return [torch.randn(views, 4, 4, 12), torch.randn(views, 8, 8, 8)]


def test_windows_keep_order_and_masks():
    windows = cut_windows(torch.arange(64).reshape(1, 8, 8), 4)
    assert windows[0, 5].tolist() == [18, 19, 26, 27]
    with pytest.raises(ValueError, match="8 x 8 cells, expected sides that 3 x 3 queries"):
        cut_windows(torch.zeros(1, 8, 8), 3)
    empty = torch.zeros(1, 2, 4, dtype=torch.bool)
    assert open_if_empty([empty])[0].all()


def test_each_cell_sees_its_window_and_the_context_alone():
    sva, (coarse, fine) = aggregator(), grids()
    with torch.no_grad():
        before = sva(plain_features([coarse, fine]))
        moved = fine.clone()
        moved[0, 5, 2] += 2                         # row 2, column 1 of 4 x 4 windows
        changed = (sva(plain_features([coarse, moved])) - before).abs().sum(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [2 * 4 + 1]


def test_masked_cells_do_not_count_and_nothing_is_nan():
    sva, (coarse, fine) = aggregator(), grids()
    sizes = torch.tensor([[100, 20]])
    masks = [padding_mask(grid, sizes) for grid in (coarse, fine)]
    with torch.no_grad():
        before = sva(plain_features([coarse, fine], masks))
        fine[~masks[1]] += 5                        # what padding holds does not matter for cells with a picture
        after = sva(plain_features([coarse, fine], masks))
    inside = masks[0][0].flatten()
    assert torch.equal(before[0, inside], after[0, inside]) and torch.isfinite(after).all()
    nothing = [torch.zeros_like(mask) for mask in masks]
    assert torch.isfinite(sva(plain_features([coarse, fine], nothing))).all()


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1), (3, 3), (378, 200)])
def test_extreme_pictures(size):
    sva, features = aggregator(), grids()
    masks = [padding_mask(grid, torch.tensor([size])) for grid in features]
    assert torch.isfinite(sva(plain_features(features, masks))).all()


def test_groups_are_brought_to_one_grid():
    sva = aggregator(num_query_group=2, query_num_list=(16, 4))
    assert sva(plain_features(grids(views=2))).shape == (2, 16, 24)
    assert sva.vision_query.shape == (2, WIDTH) and sva.mm_projector[0].in_features == 2 * WIDTH


@pytest.mark.parametrize("changes, message", [
    (dict(query_num_list=(15,)), "expected a square number"),
    (dict(query_num_list=(9,)), "3 x 3 queries do not divide"),
    (dict(num_query_group=2), "found 1 numbers, expected num_query_group = 2"),
    (dict(connector_depth=0), "expected at least 1"),
    (dict(image_token_len=12), "image_token_len: found 12"),
    (dict(vision_hidden_size=40), "expected a multiple of 16"),
])
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        aggregator(**changes)


def test_towers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 numbers for 3 towers"):
        SVAConfig((16, 64), WIDTH, 16, query_num_list=(16,)).build((12, 8, 3), 24)
    with pytest.raises(ValueError, match=r"tower 1: found a grid of \(4, 4\), expected \(8, 8\)"):
        aggregator()(plain_features([torch.zeros(1, 4, 4, 12), torch.zeros(1, 4, 4, 8)]))


def cambrian(language: nn.Module | None = None) -> MLLM:
    torch.manual_seed(0)
    settings = SVAConfig((16, 64), WIDTH, 16, query_num_list=(16,), connector_only=False, num_of_vision_sampler_layers=2,
                         start_of_vision_sampler_layers=0, stride_of_vision_sampler_layers=2)
    config = MLLMConfig(DecoderConfig(**SMALL), connector=settings, model_type="cambrian_llama",
                        mm_patch_merge_type="unpad")
    return MLLM(config, towers=[Elsewhere("a", 12), Elsewhere("b", 8)], language=language).eval()


def inputs(views: int = 2):
    ids = torch.randint(3, 60, (1, 12))
    index = torch.tensor([[-1, 0, 1, 2, 3, -2, -1, 16 + 5, 16 + 6, -2, -1, -1]])
    return ids, plain_features(grids(views=views)), index


def test_samplers_change_image_places_of_every_picture():
    model, (ids, features, index) = cambrian(), inputs()
    with torch.no_grad():
        layers = [model.language.hidden(model.embed(ids, features, index), return_layers=True)]
        with model.reading(ids, features, index) as embeddings:
            layers.append(model.language.hidden(embeddings, return_layers=True))
    changed = (layers[0][1] - layers[1][1]).abs().sum(-1)[0] > 1e-6
    assert changed.tolist() == (index[0] >= 0).tolist()
    assert not any(layer._forward_hooks for layer in model.language.model.layers)


def test_samplers_leave_no_trace_after_an_error():
    model, (ids, features, index) = cambrian(), inputs()
    with pytest.raises(RuntimeError), model.reading(ids, features, index):
        raise RuntimeError
    assert not any(layer._forward_hooks for layer in model.language.model.layers)


def test_samplers_in_a_transformers_model_are_the_same():
    from transformers import LlamaConfig, LlamaForCausalLM
    ours = cambrian()
    theirs = LlamaForCausalLM(LlamaConfig(**SMALL, rms_norm_eps=ours.language.config.rms_norm_eps,
                                          tie_word_embeddings=False)).eval()
    theirs.load_state_dict(ours.language.state_dict())
    wrapped = cambrian(TransformersDecoder(theirs))
    wrapped.connector.load_state_dict(ours.connector.state_dict())
    wrapped.vision_sampler_layers.load_state_dict(ours.vision_sampler_layers.state_dict())
    wrapped.image_newline.data.copy_(ours.image_newline.data)
    ids, features, index = inputs()
    with torch.no_grad():
        a, b = (model(ids, features, index, logits=True).logits for model in (ours, wrapped))
    assert (a - b).abs().max() < 1e-5


def test_generation_runs_the_samplers_at_the_prompt_alone():
    model, (ids, features, index) = cambrian(), inputs()
    found = model.generate(ids, features, index, max_new_tokens=6)[0]
    whole = ids
    for token in found:                                          # without a cache, the whole sentence anew each time
        rest = torch.full((1, whole.shape[1] - ids.shape[1]), -1)
        with torch.no_grad():
            logits = model(whole, features, torch.cat([index, rest], 1), logits=True).logits
        assert logits[0, -1].argmax().item() == token
        whole = torch.cat([whole, torch.tensor([[token]])], dim=1)


def test_a_model_comes_back_from_its_folder(tmp_path):
    model = cambrian()
    settings = model.config.to_dict()
    again = MLLMConfig.from_dict(settings, towers=())
    assert again.connector == model.config.connector and settings["num_of_vision_sampler_layers"] == 2
    assert {"connector.vision_query", "vision_sampler_layers.0.layers.0.proj_in.weight"} <= model.state_dict().keys()
    assert generate(model.language, torch.tensor([[1, 2]]), max_new_tokens=2)


def test_one_compilation_serves_every_picture_shape():
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    counter, sva, samplers = CompileCounter(), aggregator(connector_only=False, num_of_vision_sampler_layers=1), None
    samplers = sva.config.build_samplers(24)

    def step(coarse, fine, sizes, hidden, index):
        sight = sva.look([Features(grid, padding_mask(grid, sizes)) for grid in (coarse, fine)])
        return sampled(hidden, samplers[0], sight, index, 16).sum() + sva(sight).sum()

    compiled = torch.compile(step, backend=counter)
    for size in [(64, 64), (100, 40), (40, 100), (7, 300), (300, 299)]:
        index = torch.randint(-2, 16, (1, 9))
        compiled(*grids(), torch.tensor([size]), torch.randn(1, 9, 24), index)
    assert counter.frame_count == 1


@pytest.mark.parametrize("sides, tokens", [((1, 2), 4), ((1, 4), 16)])
def test_the_automatic_way_is_both(sides, tokens):
    "Small windows go the plain way, large ones the fast one; the numbers are the same."
    torch.manual_seed(0)
    sampler = VisionSampler(WIDTH, WIDTH, sides, WIDTH, 1)
    windows = [Window(torch.randn(1, 4, side ** 2, WIDTH), torch.ones(1, 4, side ** 2, dtype=torch.bool))
               for side in sides]
    assert sampler.layers[0].path == "auto" and pays(windows) == (tokens >= 16)
    queries, context, found = torch.randn(1, 4, WIDTH), torch.randn(1, 1, WIDTH), {}
    for path in ("auto", "fast", "plain"):
        sampler.layers[0].path = path
        with torch.no_grad():
            found[path] = sampler(queries, context, windows)
    torch.testing.assert_close(found["auto"], found["plain"])
    torch.testing.assert_close(found["fast"], found["plain"], atol=1e-5, rtol=1e-4)


def test_without_windows_every_cell_sees_everything():
    sva, (coarse, fine) = aggregator(windowed=False), grids()
    assert sva.vision_query.shape == (16, WIDTH) and sva.vision_sampler_0.layers[0].pos_embed_1.shape == (64, WIDTH)
    with torch.no_grad():
        before = sva(plain_features([coarse, fine]))
        fine[0, 5, 2] += 2
        changed = (sva(plain_features([coarse, fine])) - before).abs().sum(-1)[0] > 1e-6
    assert changed.all() and (before[0, 0] - before[0, 1]).abs().max() > 1e-4     # each cell asks its own question


def test_without_windows_by_hand():
    "One softmax over all tokens of all towers, in which padding has no share."
    sva, (coarse, fine) = aggregator(windowed=False), grids(views=2)
    masks = [torch.ones(2, 4, 4, dtype=torch.bool), torch.ones(2, 8, 8, dtype=torch.bool)]
    masks[1][1, :4] = False
    sight, layer = sva.look(plain_features([coarse, fine], masks)), sva.vision_sampler_0.layers[0]
    queries = sva.vision_query.expand(2, -1, -1)
    hidden, attention = layer.joined(queries, sight.context), layer.cross_attn
    tokens = [grid.flatten(1, 2) + getattr(layer, f"pos_embed_{k}") for k, grid in enumerate(sight.grids)]
    keys, values = (torch.cat([getattr(attention, f"{name}_proj_{k}")(one) for k, one in enumerate(tokens)], dim=1)
                    for name in "kv")
    heads = [part.unflatten(-1, (16, -1)).transpose(1, 2) for part in (attention.q_proj(hidden), keys, values)]
    scores = heads[0] @ heads[1].mT * heads[0].shape[-1] ** -.5
    scores = scores.masked_fill(~torch.cat([mask.flatten(1) for mask in masks], 1)[:, None, None], -torch.inf)
    answer = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    wanted = queries + layer.proj_out(layer.norm(hidden + attention.o_proj(answer)))
    torch.testing.assert_close(layer(queries, sight.context, sight.windows(4)), wanted, atol=1e-5, rtol=1e-4)
