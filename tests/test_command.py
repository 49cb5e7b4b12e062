"The command line: quick to start, right exit statuses, one clear line for an error."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mllm_nb import __version__, command

GOLDEN = Path(__file__).parent / "golden"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("code", ["import mllm_nb", "import mllm_nb.command as c; c.build_parser().format_help()"])
def test_nothing_heavy_is_imported(code):
    heavy = "{'torch', 'numpy', 'transformers', 'matplotlib', 'ipywidgets', 'PIL', 'jaxtyping'}"
    assert python(f"{code}; import sys; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_help_and_version(capsys):
    for option, expected in (("--help", "doctor"), ("--version", __version__)):
        with pytest.raises(SystemExit) as stop:
            command.main([option])
        assert stop.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["no-such-command"], ["data"], ["parity"]])
def test_wrong_use_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_every_subcommand_has_help(capsys):
    for one in command.COMMANDS:
        with pytest.raises(SystemExit):
            command.main([one.name, "--help"])
        assert one.name in capsys.readouterr().out


def test_parity(capsys):
    assert command.main(["parity", str(GOLDEN), "--system", "llava", "--kind", "manifest"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed, 0 unsupported"
    assert command.main(["parity", "no-such-folder"]) == 2


def test_data_check(tmp_path, capsys):
    good = {"id": "1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(good) + "\n")
    assert command.main(["data", "check", str(file)]) == 0
    file.write_text(json.dumps(good) + "\n" + json.dumps({"id": "2", "image": "missing.png", "conversations": []}) + "\n")
    assert command.main(["data", "check", str(file)]) == 1
    assert "missing.png" in capsys.readouterr().out
    assert command.main(["data", "check", str(tmp_path / "nothing.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "nothing.jsonl" in error and "Traceback" not in error


def test_mixture(tmp_path, capsys):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    lines = [json.dumps({"id": str(i), "conversations": [{**turns[0], "value": f"What is {i}?"}, turns[1]]}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, lines[3]]))
    (tmp_path / "m.json").write_text(json.dumps({"threshold": 12, "sources": [{"name": "a", "file": "a.jsonl", "category": "general"}]}))
    out = tmp_path / "out"
    assert command.main(["mixture", str(tmp_path / "m.json"), "--out", str(out), "--no-near"]) == 0
    text = capsys.readouterr().out
    assert "| a " in text and (out / "report.md").exists() and len((out / "mixture.jsonl").read_text().splitlines()) == 12
    assert command.main(["mixture", str(tmp_path / "m.json"), "--out", str(out), "--survey", str(out / "report.json"), "--total", "5", "--shards", "2"]) == 0
    assert "5 records" in capsys.readouterr().out and len(list((out / "shards").glob("*.tar"))) == 3
    (tmp_path / "a.jsonl").unlink()
    assert command.main(["mixture", str(tmp_path / "m.json"), "--out", str(out)]) == 2
    assert "source 'a': no file" in capsys.readouterr().err


def test_engine(tmp_path, capsys):
    out = tmp_path / "run"
    assert command.main(["engine", "run", "--out", str(out), "--fields", "physics", "--until", "pages"]) == 0
    assert command.main(["engine", "run", "--out", str(out), "--fields", "physics"]) == 0
    assert "engine.jsonl" in capsys.readouterr().out and len((out / "engine.jsonl").read_text().splitlines()) == 4
    assert command.main(["engine", "rewrite", str(out / "engine.jsonl"), "--kind", "chat", "--out", str(tmp_path / "chat")]) == 0
    assert command.main(["engine", "run", "--out", str(out), "--until", "nothing"]) == 2
    assert command.main(["engine", "run", "--out", str(out), "--pages", str(tmp_path / "none")]) == 2
    assert command.main(["engine", "run", "--out", str(tmp_path / "w"), "--wikipedia", "me@example.org", "--api", "http://127.0.0.1:9/api",
                         "--fields", "tides", "--between", "0"]) == 1
    assert "private address" in (tmp_path / "w" / "links.jsonl").read_text()


def test_convert(tmp_path, capsys):
    torch.save({"model.mm_projector.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
    assert command.main(["convert", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mm_projector.safetensors")
    assert command.main(["convert", str(tmp_path / "mm_projector.safetensors").replace("mm_projector.safetensors", "empty")]) != 0


def test_doctor(capsys):
    assert command.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for expected in ("mllm_nb", "torch", "device", "memory", *(f"extra {extra}" for extra in command.EXTRAS)):
        assert expected in text


def test_errors_are_one_line_and_debug_raises(monkeypatch, capsys):
    def fail(arguments): raise ValueError("a reason")
    broken = command.Command("broken", "fails", lambda parser: None, fail)
    monkeypatch.setattr(command, "COMMANDS", (broken,))
    assert command.main(["broken"]) == 2
    assert capsys.readouterr().err == "mllm broken: a reason\n"
    with pytest.raises(ValueError, match="a reason"):
        command.main(["--debug", "broken"])


@pytest.mark.parametrize("error, said", [
    (KeyError("x"), "KeyError: 'x' (nobody foresaw this"), (MemoryError(), "MemoryError"), (RuntimeError("a\nb"), "RuntimeError: a b"),
    (KeyboardInterrupt(), "stopped"), (FileNotFoundError(2, "No such file", "f"), "f: no such file")])
def test_no_error_shows_a_traceback(error, said, monkeypatch, capsys):
    def fail(arguments): raise error
    monkeypatch.setattr(command, "COMMANDS", (command.Command("broken", "fails", lambda parser: None, fail),))
    assert command.main(["broken"]) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mllm broken: ") and said in line


@pytest.mark.skipif(os.name != "posix", reason="needs a shell's pipes")
def test_odd_names_are_printed_and_a_reader_may_leave(tmp_path):
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps({"id": f"\ud800{i}"}) for i in range(20_000)))
    call = f"{sys.executable} -m mllm_nb.command data check {tmp_path}/records.jsonl --all | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", call], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


@pytest.mark.parametrize("line, said", [
    ("part vqgan --steps 0 --out {0}", "at least 1"), ("claims --seeds -1 --out {0}", "at least 1"),
    ("tour --questions x --out {0}", "whole number"), ("tokenize --out {0}", "name one source"),
    ("tokenize a.png --world 3 --out {0}", "name one source"), ("convert {0}/nowhere", "no such file or folder"),
    ("merge {0}/nowhere --out {0}/out", "nowhere: no such folder"), ("parity {0}/nowhere", "mllm parity: {0}/nowhere/index.json: "),
    ("data check {0}/nowhere", "mllm data check: {0}/nowhere: no such file"), ("plan llava-v1.5-7b --price nan", "expected a number of at least 0"),
    ("plan llava-v1.5-7b --utilization 0", "more than 0 and at most 1"), ("engine run --out {0}/e --wikipedia x", "mail address"),
    ("engine run --out {0}/e --fields ,", "expected at least one field"),
    ("chat --model m --image i --temperature -1", "expected a number of at least 0")])
def test_foolish_arguments_get_one_line(line, said, tmp_path, capsys):
    try:
        status = command.main([word.format(tmp_path) for word in line.split()])
    except SystemExit as stopped:                 # argparse's own way
        status = stopped.code
    assert status == 2 and said.format(tmp_path) in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_a_talk_ends_with_the_input(monkeypatch):
    def closed(prompt):
        raise EOFError
    monkeypatch.setattr("builtins.input", closed)
    assert command.ask() == ""
