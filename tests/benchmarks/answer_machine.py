"""Short answers on request? `python tests/benchmarks/answer_machine.py [SEEDS]` trains the miniature of LLaVA on the same
questions and answers twice, without and with a request behind each question that has a short answer, and asks held-out
questions plainly and with the request. Writes data_samples/results/answer_machine.json (three seeds: about 15 minutes
on one core).

Three of four conversations have answers of a word or two, the others answer the same kinds of questions in a sentence.
"""
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from mllm_nb.papers.cambrian_data import REQUEST, MixedLesson, asked
from mllm_nb.samples import samples_root
from mllm_nb.training.miniatures import ALIGN, TUNE, assemble_miniature, teach


def run(seed: int) -> dict[str, dict]:
    found = {}
    for name, asking in (("before", False), ("after", True)):
        model, processor = assemble_miniature(seed=seed)
        lesson = MixedLesson(**vars(replace(TUNE, seed=seed)), asking=asking)
        with tempfile.TemporaryDirectory() as folder:
            teach(model, processor, replace(ALIGN, seed=seed), Path(folder) / "align", progress=False)
            teach(model, processor, lesson, Path(folder) / "tune", progress=False)
        found[name] = {"plain": asked(model, processor, "", seed), "asked to be short": asked(model, processor, f"\n{REQUEST.short}", seed)}
        print(seed, name, json.dumps(found[name]), flush=True)
    return found


if __name__ == "__main__":
    target = samples_root() / "results" / "answer_machine.json"
    results = json.loads(target.read_text()) if target.exists() else {}
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 3):
        if str(seed) not in results:
            results[str(seed)] = run(seed)
            target.write_text(json.dumps(results, indent=1) + "\n")
