"""Short answers on request? `python tests/benchmarks/answer_machine.py [SEEDS]` trains the miniature of LLaVA on the same
questions and answers twice, without and with a request behind each question that has a short answer, and asks held-out
questions plainly and with the request. Writes data_samples/results/answer_machine.json (three seeds: about 15 minutes
on one core).

Three of four conversations have answers of a word or two, the others answer the same kinds of questions in a sentence.
"""
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mllm_nb.data.mixture import AnswerPrompt
from mllm_nb.data.records import Sample
from mllm_nb.data.world import held_out_questions
from mllm_nb.evaluation.world import written_answers
from mllm_nb.language.chat import Turn
from mllm_nb.samples import samples_root
from mllm_nb.training.miniatures import ALIGN, TUNE, Lesson, assemble_miniature, teach

SENTENCE = "in the picture, the answer is {}."
REQUEST = AnswerPrompt(short="in one word.")   # the usual request is 30 tokens of this small vocabulary, this one is 8
QUESTIONS = 200


class Mixed(Sequence):
    "The world's conversations: one of four in sentences, the others short, with the request if `asking`."
    def __init__(self, world, asking: bool):
        self.world, self.asking = world, asking

    def __len__(self) -> int:
        return len(self.world)

    def __getitem__(self, i: int) -> Sample:
        sample = self.world[i]
        if random.Random(i).random() < .25:
            turns = tuple(replace(turn, text=SENTENCE.format(turn.text)) if turn.role == "gpt" else turn for turn in sample.turns)
        else:
            turns = REQUEST(sample.turns) if self.asking else sample.turns
        return replace(sample, turns=turns)


@dataclass(frozen=True)
class MixedLesson(Lesson):
    asking: bool = False

    def world(self, pictures: int):
        return Mixed(replace(super().world(pictures), questions=3), self.asking)


def asked(model, processor, request: str, seed: int) -> dict[str, float]:
    "How many held-out answers are sentences, how long they are, and how many are right."
    held_out = [(picture, question) for picture, question in held_out_questions(2 * QUESTIONS, seed)
                if picture.draw() is not None][:QUESTIONS]
    samples = [Sample(str(i), (picture.draw(),), (Turn("human", f"<image>\n{question.text}{request}"), Turn("gpt", question.answer)))
               for i, (picture, question) in enumerate(held_out)]
    texts = [text for start in range(0, len(samples), 50)
             for text in written_answers(model, processor, samples[start:start + 50], [processor.tokenizer.eos_token_id], 40)]
    sentences = [text.startswith(SENTENCE[:14]) for text in texts]
    right = [text in (question.answer, SENTENCE.format(question.answer)) for text, (_, question) in zip(texts, held_out)]
    return {"sentences": sum(sentences) / len(texts), "right": sum(right) / len(texts),
            "words": sum(len(text.split()) for text in texts) / len(texts)}


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
