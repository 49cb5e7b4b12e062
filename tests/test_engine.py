"The data engine: hostile pages, careful fetching, writers that fail, and runs that are killed and go on."
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from mllm_nb.data import engine as module
from mllm_nb.data.engine import (
    STEPS, EndpointWriter, Engine, EngineError, EngineSettings, FetchError, Fetcher, Item, Journal, Limits, SavedPages,
    TemplateWriter, Wikipedia, WriterError, alone, check_address, checked_form, clean_page, decode_page, failures, file_title,
    is_public, json_in, page_pieces, pair_problem, read_lines, rewrite, run_step)
from mllm_nb.data.records import Records, check_records
from mllm_nb.samples import samples_path

AGENT = "mllm_nb-tests/1 (tests@example.org)"
PAGES = samples_path("pages")
HERE = ("127.0.0.1",)
QUICK = Limits(between=0.0, timeout=5, deadline=10, private_hosts=HERE)


def png(colour="teal", size=(90, 80)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def serving(answer):
    """A server on this machine; `answer(handler)` writes the reply. Yields (address, list of what was asked)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def log_message(self, *_): pass

        def reply(self, body=b"", status=200, **headers):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | {k.replace("_", "-"): v for k, v in headers.items()}).items():
                if value is not None: self.send_header(name, value)
            self.end_headers()
            try: self.wfile.write(body)
            except OSError: pass

        def do_GET(self):
            self.sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            asked.append(self.path)
            answer(self)

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": .01}, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}", asked
    finally: server.shutdown(); server.server_close(); thread.join()


# ---- pages

def test_scripts_menus_and_hidden_words_are_left_out():
    page = clean_page("""<title>T &amp; U</title><body><nav>menu</nav><h1>Head</h1><p>One<script>var a = "<p>evil</p>"</script> two
        <style>p{}</style><b>three</b><p hidden>unseen<p>four<!-- no --><div style="display: none">gone <div>still</div></div>
        five <table><tr><td>cell</table><sup class="reference">[1]</sup> six<noscript>off</noscript></body>""")
    text = " ".join(" ".join(text.split()) for _, text in page.sections).strip()
    assert "four" in text and "five" in text and "unseen" not in text
    assert page.title == "Head" and text.startswith("One two three") and "six" in text
    for word in ("menu", "evil", "var", "gone", "still", "cell", "[1]", "off", "no "): assert word not in text


def test_figures_take_captions_sections_and_skip_icons():
    page = clean_page("""<p>first</p><img src=a.png alt="a plain picture"><h2>Two</h2><p>second</p>
        <figure><img src="b.png" alt="alt"><figcaption>The <i>caption</i></figcaption></figure>
        <figure><img src="c.png" alt="only alt"></figure><img src="icon.png" width="16"><img alt="no address"><img src="f" class="mwe-math-fallback">
        <figure><img src="d.png"><figcaption>never closed<h2>Three</h2><p>third""")
    assert [(f.address, f.caption, page.sections[f.section][0]) for f in page.figures] == [
        ("a.png", "a plain picture", ""), ("b.png", "The caption", "Two"), ("c.png", "only alt", "Two"),
        ("d.png", "never closed", "Two")]
    assert page.sections[-1] == ("Three", "third")


@pytest.mark.parametrize("part", ["<!--", "<!", "<a ", "<a '\">", "</", "<script>", '<p a="', "&", "<", "<div>", "<b '>\"", "<!-->", "&#x"])
def test_any_page_is_read_in_linear_time(part):
    start = time.process_time()
    clean_page(part * 60_000)
    list(page_pieces(part * 60_000 + ">"))
    assert time.process_time() - start < 4


def test_random_pages_never_raise():
    random_ = random.Random(0)
    parts = ["<", ">", "p", "/", "!--", "-->", '"', "'", "=", " ", "script", "img src=x", "figure", "é", "\x00", "&amp;", "&#999999999;",
             "figcaption", "h2", "\ud800", "style='display:none'", "br"]
    for _ in range(300):
        text = "".join(random_.choices(parts, k=60))
        page = clean_page(text)
        assert all("\x00" not in said and "\ud800" not in said for _, said in page.sections)


@pytest.mark.parametrize("data, kind, expected", [
    ("é °C".encode(), "", "utf-8"), ("é °C".encode(), "text/html; charset=iso-8859-1", "utf-8"),
    ("é °C".encode("cp1252"), "text/html; charset=utf-8", "cp1252"), ("é °C".encode("latin-1"), "charset=ISO-8859-1", "iso-8859-1"),
    ("é °C".encode("utf-16"), "", "utf-16"), ("\ufeffé °C".encode(), "", "utf-8-sig"), (("é °C" * 60).encode("utf-16-le"), "", "utf-16-le"),
    ("привет °C é".encode("utf-8"), "text/html; charset=no-such", "utf-8"),
    (b'<meta charset="hex">' + "é °C".encode("cp1252"), "", "cp1252"), (b'<meta charset="windows-1251">' + "привет".encode("cp1251"), "", "windows-1251")])
def test_encodings(data, kind, expected):
    text, encoding, lost = decode_page(data, kind)
    assert encoding == expected and lost == 0 and ("é °C" in text or "привет" in text)


def test_what_is_no_text_is_refused():
    for data in (random.Random(0).randbytes(4000), b"\x00" * 500, png(size=(300, 300)) * 40):
        with pytest.raises(EngineError, match="expected text"): decode_page(data)
    assert decode_page(b"abc\x81def")[2] == 1, "one unreadable character is counted, not fatal"


# ---- fetching

@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://a.org/", "gopher://a.org", "javascript:alert(1)", "//a.org/x", "a.org", "",
                                     "http://", "http://me:pw@a.org/", "http://me@a.org/", "http://a.org/\r\nX: 1", "http://a.org:99999/", "http://[::1",
                                     "data:text/html,x", "http://a.org:0/", "http://a b.org/"])
def test_addresses_that_are_refused_unasked(address):
    with pytest.raises(FetchError): check_address(address)


@pytest.mark.parametrize("ip, public", [("93.184.216.34", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("10.0.0.1", False),
                                        ("172.16.5.4", False), ("192.168.1.1", False), ("169.254.169.254", False), ("0.0.0.0", False),
                                        ("100.64.0.1", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::", False), ("::1", False),
                                        ("fe80::1%eth0", False), ("fc00::1", False), ("::ffff:10.0.0.1", False), ("::ffff:93.184.216.34", True),
                                        ("64:ff9b::a00:1", False), ("2002:7f00:1::", False)])
def test_private_networks(ip, public):
    assert is_public(ip) is public


def test_private_addresses_need_permission_also_behind_names_and_redirects(tmp_path, monkeypatch):
    def answer(page):
        where = {"/out": "http://127.0.0.2:9/x", "/file": "file:///etc/passwd", "/loop": "/loop", "/good": "/there"}.get(page.path)
        page.reply(b"ok", 302 if where else 200, **({"Location": where} if where else {}))
    with serving(answer) as (here, asked):
        with pytest.raises(FetchError, match="private"): Fetcher(tmp_path / "a", AGENT, replace(QUICK, private_hosts=()))(f"{here}/x")
        assert asked == []
        fetch = Fetcher(tmp_path / "b", AGENT, QUICK, sleep=lambda _: None)
        assert fetch(f"{here}/good").data == b"ok" and fetch(f"{here}/good").address.endswith("/there")
        with pytest.raises(FetchError, match="private"): fetch(f"{here}/out")
        with pytest.raises(FetchError, match="not allowed"): fetch(f"{here}/file")
        with pytest.raises(FetchError): fetch(f"{here}/loop")
        assert asked.count("/loop") <= QUICK.redirects + 1
        port = int(here.rsplit(":", 1)[1])                       # a public-looking name that leads home
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k) if host == "a.example" else real(host, *a, **k))
        before = len(asked)
        with pytest.raises(FetchError, match="private"): fetch(f"http://a.example:{port}/x")
        assert len(asked) == before


def test_a_name_cannot_change_its_mind_between_check_and_connection(tmp_path, monkeypatch):
    "The address that was checked is the address that is connected to: the name is asked for once."
    calls = []
    def resolve(host, port, *rest, **options):
        calls.append(host)
        ip = "93.184.216.34" if len(calls) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))]
    connected = []
    class Sock(socket.socket):
        def connect(self, address): connected.append(address); raise ConnectionRefusedError("not today")
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(module.socket, "socket", Sock)
    with pytest.raises(FetchError, match="not today"): Fetcher(tmp_path, AGENT, Limits(tries=1))("http://rebind.example/")
    assert calls == ["rebind.example"] and connected == [("93.184.216.34", 80)]


def test_a_python_whose_connections_cannot_be_checked_is_refused(tmp_path, monkeypatch):
    class Other(module.http.client.HTTPConnection):
        def __init__(self, *a, **k): super().__init__(*a, **k); del self._create_connection
    monkeypatch.setattr(module.http.client, "HTTPConnection", Other)
    with serving(lambda page: page.reply(b"ok")) as (here, asked):
        with pytest.raises(EngineError, match="checked"): Fetcher(tmp_path, AGENT, QUICK)(here)
        assert asked == []


def test_sizes_times_compression_and_torn_answers(tmp_path):
    def answer(page):
        if page.path == "/declared": page.reply(b"x", Content_Length="999999999999")
        elif page.path == "/large": page.reply(b"x" * 200_000, Content_Length=None)
        elif page.path == "/gzip": page.reply(b"x", Content_Encoding="gzip")
        elif page.path == "/torn": page.reply(b"half", Content_Length="400")
        elif page.path == "/head":                               # a header that drips, a byte at a time
            try:
                for byte in b"HTTP/1.0 200 OK\r\nX: " + b"x" * 1000: page.wfile.write(bytes([byte])); page.wfile.flush(); time.sleep(.05)
            except OSError: pass
        else:
            page.send_response(200); page.end_headers()
            try:
                for _ in range(1000): page.wfile.write(b"x"); page.wfile.flush(); time.sleep(.05)
            except OSError: pass
    with serving(answer) as (here, asked):
        fetch = Fetcher(tmp_path, AGENT, replace(QUICK, largest=100_000, deadline=.6, tries=2), sleep=lambda _: None)
        for path, reason in {"/declared": "at most", "/large": "at most", "/gzip": "compressed", "/torn": "4 of 400",
                             "/drip": "not finished", "/head": "not finished"}.items():
            start = time.monotonic()
            with pytest.raises(FetchError, match=reason): fetch(here + path)
            assert time.monotonic() - start < 15, path
        assert asked.count("/torn") == 2 and asked.count("/large") == 1, "what may pass is tried again, what may not is not"
        assert not list(tmp_path.rglob("*")) or all(path.is_dir() for path in tmp_path.rglob("*")), "nothing bad is kept"


def test_politeness(tmp_path, caplog):
    waits, tries = [], Counter()
    def answer(page):
        tries[page.path] += 1
        if page.path == "/busy" and tries["/busy"] < 3: page.reply(b"", 503, Retry_After="7")
        elif page.path == "/never": page.reply(b"", 429, Retry_After="100000")
        elif page.path == "/gone": page.reply(b"not here", 404)
        else: page.reply(page.headers["User-Agent"].encode())
    with serving(answer) as (here, _):
        fetch = Fetcher(tmp_path, AGENT, replace(QUICK, between=3.0), sleep=waits.append)
        assert fetch(f"{here}/busy").data == AGENT.encode()
        assert waits.count(7.0) == 2 and any(2 < wait <= 3 for wait in waits), waits
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 2 and "status 503" in said[0] and said[1].endswith(f"; try 3 of {QUICK.tries} in 7 s"), said
        with pytest.raises(FetchError, match="100000"): fetch(f"{here}/never")
        with pytest.raises(FetchError, match="404.*not here"): fetch(f"{here}/gone")
        assert tries["/gone"] == 1 and tries["/never"] == 1
        assert fetch(f"{here}/busy").data == AGENT.encode() and tries["/busy"] == 3, "kept, not asked again"
        assert Fetcher(tmp_path, AGENT, QUICK)(f"{here}/busy").data == AGENT.encode() and tries["/busy"] == 3
    with pytest.raises(EngineError, match="agent"): Fetcher(tmp_path, "")
    with pytest.raises(EngineError, match="agent"): Fetcher(tmp_path, "bot/1 me@a.org\r\nX: y")


def test_a_damaged_store_is_fetched_again(tmp_path):
    with serving(lambda page: page.reply(b"whole")) as (here, asked):
        fetch = Fetcher(tmp_path, AGENT, QUICK)
        fetch(here + "/x")
        path = next(path for path in tmp_path.rglob("*") if path.is_file())
        for damaged in (b"", b"{", path.read_bytes()[:-2], b"{}\nwhole", b"[]\nwhole"):
            path.write_bytes(damaged)
            assert fetch(here + "/x").data == b"whole"
        assert len(asked) == 6 and fetch(here + "/x").data == b"whole" and len(asked) == 6


def test_no_address_chooses_where_it_is_kept(tmp_path):
    with serving(lambda page: page.reply(b"ok")) as (here, _):
        fetch = Fetcher(tmp_path / "store", AGENT, QUICK)
        for path in ("/../../evil", "/%2e%2e/%2e%2e/evil", "/" + "a" * 5000, "/a?b=../../c#d", "/ä"): assert fetch(here + path).data == b"ok"
    assert {path.name for path in tmp_path.iterdir()} == {"store"}


# ---- writers

def reply(content): return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


GOOD = reply('{"pairs": [{"question": "What is it here?", "answer": "A lens."}]}')
FACTS = {"title": "Lens", "caption": "A lens.", "text": "A lens is glass.", "count": 2}


@pytest.mark.parametrize("bad, said", [
    ((b"", 500), "500"), ((b"slow down", 429), "429"), ((b"<html>", 200), "choices"), ((b"", 200), "choices"), ((b"[1]", 200), "choices"),
    ((b"{}", 200), "choices"), ((reply(""), 200), "expected words"), ((reply(None), 200), "expected words"), ((reply("I can't."), 200), "expected JSON"),
    ((reply('{"pairs": []}'), 200), "pairs"), ((reply('{"pairs": "none"}'), 200), "pairs"), ((reply('[{"question": 3}]'), 200), "question"),
    ((reply('{"pairs": [{"question": "a b c", "answer": "  "}]}'), 200), "answer"), ((b"[" * 50_000, 200), "choices"), ((reply("[" * 5000), 200), "expected JSON"),
    ((reply('{"pairs": [{"question": "q q q", "answer": "' + "x" * 5000 + '"}]}'), 200), "5000 characters")])
def test_an_endpoint_that_misbehaves_is_asked_again_within_a_bound(bad, said):
    replies = [bad, bad, (GOOD, 200)]
    with serving(lambda page: page.reply(*replies.pop(0))) as (here, asked):
        waits = []
        writer = EndpointWriter(f"{here}/v1/", "m", limits=replace(QUICK, redirects=0, between=1, tries=3), sleep=waits.append)
        assert writer("questions", FACTS) == {"pairs": [{"question": "What is it here?", "answer": "A lens."}]}
        assert asked == ["/v1/chat/completions"] * 3 and waits == [1, 2]
    with serving(lambda page: page.reply(*bad)) as (here, asked):
        with pytest.raises(WriterError, match=said): EndpointWriter(f"{here}/v1", "m", limits=replace(QUICK, tries=3), sleep=lambda _: None)("questions", FACTS)
        assert len(asked) == 3


def test_refusals_are_not_repeated_and_the_key_stays_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_KEY", "secret-key")
    seen = []
    def answer(page):
        seen.append((page.path, page.headers.get("Authorization"), page.sent))
        if page.path.startswith("/moved"): page.reply(b"", 307, Location="http://127.0.0.1:9/steal")
        elif page.path.startswith("/no"): page.reply(b'{"error": "bad key"}', 401)
        else: page.reply(GOOD)
    with serving(answer) as (here, _):
        def writer(path): return EndpointWriter(here + path, "m", key_in="TEST_KEY", limits=replace(QUICK, redirects=0), sleep=lambda _: None)
        writer("/v1")("questions", FACTS)
        assert seen[0][1] == "Bearer secret-key" and json.loads(seen[0][2])["model"] == "m"
        for path, said in (("/no", "401.*bad key"), ("/moved", "redirected")):
            with pytest.raises(WriterError, match=said) as caught: writer(path)("questions", FACTS)
            assert "secret-key" not in str(caught.value) and "secret-key" not in repr(writer(path))
        assert len(seen) == 3
    with pytest.raises(FetchError): EndpointWriter("file:///v1", "m")


def test_a_model_that_sees_gets_the_picture(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    bodies = []
    def answer(page): bodies.append(json.loads(page.sent)); page.reply(GOOD)
    with serving(answer) as (here, _):
        EndpointWriter(here, "m", see=True, limits=QUICK)("questions", FACTS | {"file": str(tmp_path / "x.png")})
    assert bodies[0]["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


def test_forms():
    assert json_in('well: ```json\n{"a": [1]}\n``` bye') == {"a": [1]} and json_in("x [1, 2] y") == [1, 2]
    assert checked_form("topics", {"topics": ["a b", "a  b", "c"]}) == {"topics": ["a b", "c"]}
    chat = {"turns": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b\x00\u202e"}]}
    assert checked_form("chat", chat)["turns"][1]["value"] == "b"
    for kind, found in (("chat", {"turns": chat["turns"][:1]}), ("chat", {"turns": chat["turns"][::-1]}), ("long", {"answer": ["x"]}),
                        ("topics", {"topics": [{"a": 1}]}), ("poem", {})):
        with pytest.raises(WriterError): checked_form(kind, found)


def test_template_writer_answers_from_the_facts_and_is_steady():
    writer = TemplateWriter()
    text = "A lens is a piece of glass that bends light. It was sold for about 35 days in a row."
    facts = {"title": "Lens", "caption": "Light in a lens.", "text": text, "count": 9}
    pairs = writer("questions", facts)["pairs"]
    assert writer("questions", facts)["pairs"] == pairs and len(pairs) == 3
    assert {"question": "What is a lens?", "answer": "A piece of glass that bends light."} in pairs
    assert pairs[-1]["answer"] == "35 days"
    with pytest.raises(WriterError): writer("questions", facts | {"caption": "", "text": "Nothing here"})


def test_checks_of_pairs():
    facts = {"title": "Lens", "caption": "Three rays of light in a lens", "text": "A lens bends light towards its focus."}
    def why(question, answer): return pair_problem(question, answer, facts, .5)
    assert why("What does it show?", "Three rays in a lens.") is None
    for question, answer, said in (("What is it?", "Bananas from Peru.", "page"), ("Why?", "A lens", "three words"), ("What is a lens?", "what is a lens", "repeats"),
                                   ("What is <b>it</b> here?", "A lens", "markup"), ("What does it show?", "See https://a.org/lens", "markup"),
                                   ("What does it show?", "As an AI language model I see a lens", "itself"), ("What does it show?", "lens " * 400, "400 words"),
                                   ("What does it show?", "According to the caption, a lens", "itself")):
        assert said in why(question, answer), answer


# ---- journals and steps

def test_journal_cuts_off_a_torn_line_and_names_a_broken_one(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    for i in range(3): journal.add(f"k{i}", {"n": i, "text": "é\n"})
    journal.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = Journal(path)
        assert len(journal.spans) == sum(end <= cut for end in ends)
        journal.add("new", {"n": 9})
        assert journal["new"]["n"] == 9 and all(journal[f"k{i}"]["n"] == i for i in range(3) if f"k{i}" in journal)
        journal.close()
    path.write_bytes(b"{broken}\n" + whole)
    with pytest.raises(EngineError, match="line 1"): Journal(path)


def test_steps_record_failures_retry_them_when_asked_and_stop_when_all_fails(tmp_path):
    calls, good = Counter(), {"a", "b"}
    def work(facts):
        calls[facts["n"]] += 1
        if facts["n"] not in good: raise EngineError("no luck")
        return {"made": facts["n"] * 2}
    items = [Item(name, {"n": name}) for name in "abcab"]
    path = tmp_path / "step.jsonl"
    assert run_step(path, items, work) == {"ok": 2, "failed": 1}
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    assert json.loads(path.read_text().splitlines()[2]) == {"key": "c", "status": "failed", "reason": "no luck"}
    run_step(path, items, work)
    assert calls == {"a": 1, "b": 1, "c": 1}, "nothing is done twice"
    good.add("c")
    assert run_step(path, items, work, retry=True) == {"ok": 3} and calls["c"] == 2 and calls["a"] == 1
    good.clear()
    with pytest.raises(EngineError, match="4 failed in a row.*no luck"):
        run_step(tmp_path / "other.jsonl", [Item(str(i), {"n": str(i)}) for i in range(9)], work, patience=4)
    assert not (tmp_path / "other.jsonl").exists()


def test_stopping_keeps_what_was_under_way(tmp_path):
    def work(facts):
        if facts["n"] == 3: raise KeyboardInterrupt
        time.sleep(.05)
        return {"made": facts["n"]}
    with pytest.raises(KeyboardInterrupt):
        run_step(tmp_path / "s.jsonl", [Item(str(i), {"n": i}) for i in range(50)], work, workers=4)
    journal = Journal(tmp_path / "journal" / "s.jsonl")
    assert {"0", "1", "2"} <= set(journal.spans) and "3" not in journal and len(journal.spans) < 20
    journal.close()
    work_on = lambda facts: {"made": facts["n"]}  # noqa: E731
    assert run_step(tmp_path / "s.jsonl", [Item(str(i), {"n": i}) for i in range(50)], work_on) == {"ok": 50}


def test_stopping_waits_for_nobody_long(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_nb.data.engine.LAST_WORDS", .3)
    never = threading.Event()
    def work(facts):
        if facts["n"] == 2: raise KeyboardInterrupt
        if facts["n"] == 1: never.wait()                         # an endpoint that does not answer
        return {"made": facts["n"]}
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_step(tmp_path / "s.jsonl", [Item(str(i), {"n": i}) for i in range(50)], work, workers=2)
    assert time.monotonic() - start < 5
    never.set()
    found = Journal(tmp_path / "journal" / "s.jsonl")
    assert set(found.spans) == {"0"}
    found.close()


def test_a_finished_file_that_was_edited_is_named_with_its_line(tmp_path):
    (tmp_path / "pages.jsonl").write_text('{"status": "ok"}\n{"status"\n')
    with pytest.raises(EngineError, match="pages.jsonl, line 2"): list(read_lines(tmp_path / "pages.jsonl"))
    (tmp_path / "pages.jsonl").write_text('{"status": "ok"}\n' + '{"status": "failed", "reason": "no"}\n' * 5)
    assert failures(tmp_path / "pages.jsonl", 2) == [f"{tmp_path}/pages.jsonl, line {i}: no" for i in (2, 3)] + [
        f"{tmp_path}/pages.jsonl: ... and 3 more"]


@pytest.mark.parametrize("workers", [1, 4])
def test_other_errors_are_not_swallowed(tmp_path, workers):
    def work(facts): raise KeyError("a bug")
    with pytest.raises(KeyError): run_step(tmp_path / "s.jsonl", [Item("a", {})], work, workers=workers)


def test_several_workers_do_the_same_and_never_more_at_a_time(tmp_path):
    now, most, taken = [0], [0], [0]
    lock = threading.Lock()
    def items():
        for i in range(40): taken[0] += 1; yield Item(str(i), {"n": i})
    def work(facts):
        with lock: now[0] += 1; most[0] = max(most[0], now[0])
        assert taken[0] - facts["n"] <= 12, "items are not taken far ahead"
        time.sleep(.002 * (facts["n"] % 3))
        with lock: now[0] -= 1
        if facts["n"] % 5 == 0: raise EngineError("five")
        return {"made": facts["n"]}
    assert run_step(tmp_path / "a" / "s.jsonl", items(), work) == {"ok": 32, "failed": 8} and most[0] == 1
    taken[0] = most[0] = 0
    assert run_step(tmp_path / "b" / "s.jsonl", items(), work, workers=4) == {"ok": 32, "failed": 8}
    assert (tmp_path / "a" / "s.jsonl").read_bytes() == (tmp_path / "b" / "s.jsonl").read_bytes() and 1 < most[0] <= 4
    taken[0] = 0
    with pytest.raises(EngineError, match="3 failed in a row"):
        run_step(tmp_path / "c" / "s.jsonl", items(), lambda facts: work({"n": 0}), workers=4, patience=3)


# ---- the engine

def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")} | {path.name: path.read_bytes() for path in folder.glob("images/*.png")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "What an undisturbed run gives."
    folder = tmp_path_factory.mktemp("engine") / "whole"
    counts = Engine(folder, SavedPages(PAGES)).run()
    return folder, counts, outputs(folder)


def test_the_shipped_pages(whole):
    folder, counts, _ = whole
    assert counts["pages"] == {"ok": 7, "failed": 1} and counts["pictures"] == {"ok": 8, "failed": 5} and counts["records"]["ok"] == 8
    records = Records(folder / "engine.jsonl")
    assert len(records) == 8 and check_records(records, "decode").ok
    text = (folder / "engine.jsonl").read_text() + (folder / "pages.jsonl").read_text()
    for word in ("buy now", "Hidden words", "switch on", "\x00", "steal", "All pages"): assert word not in text
    pages = {page["address"]: page for page in map(json.loads, open(folder / "pages.jsonl")) if page["status"] == "ok"}
    assert pages["leaf.html"]["encoding"] == "cp1252" and "35 °C" in pages["leaf.html"]["sections"][2][1]
    assert pages["pendulum.html"]["encoding"] == "utf-16" and pages["moon.html"]["title"] == "Phases of the moon"
    reasons = [line["reason"] for line in map(json.loads, open(folder / "pictures.jsonl")) if line["status"] == "failed"]
    assert sum("expected a path inside" in reason for reason in reasons) == 3 and any("truncated" in reason for reason in reasons)


def in_child(work):
    "Run in a forked process; its exit status."
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start(); process.join(60)
    return process.exitcode


def dying(point, at):
    "Make the `at`-th use of a point of the program the last thing that this process does."
    count = [0]
    def then(original, torn=False):
        def act(*arguments, **options):
            count[0] += 1
            if count[0] == at:
                if torn: arguments[0].file.write(b'{"key": "torn", "status": "o'); arguments[0].file.flush()
                if point.endswith("after"): original(*arguments, **options)
                os._exit(9)
            return original(*arguments, **options)
        return act
    if point.startswith("replace"): module.os.replace = then(os.replace)
    elif point == "torn line": Journal.add = then(Journal.add, torn=True)
    elif point.startswith("line"): Journal.add = then(Journal.add)
    elif point == "writer": TemplateWriter.__call__ = then(TemplateWriter.__call__)
    elif point.startswith("source"): SavedPages.read = then(SavedPages.read)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("point", ["replace", "replace after", "torn line", "line", "line after", "writer", "source", "source after"])
def test_killed_anywhere_and_resumed_gives_the_same_bytes(tmp_path, whole, point):
    folder = tmp_path / "run"
    def attempt(at):
        def work():
            dying(point, at)
            Engine(folder, SavedPages(PAGES)).run()
            os._exit(0)
        return work
    statuses = [in_child(attempt(at)) for at in (1, 2, 3, 5, 8, 4, 1)]
    assert statuses.count(9) >= 3, statuses
    assert not (folder / "engine.jsonl").exists() or point != "replace" or statuses[-1] == 0
    Engine(folder, SavedPages(PAGES)).run()
    assert outputs(folder) == whole[2]
    keys = [json.loads(line)["key"] for path in folder.glob("journal/*") for line in open(path)]
    assert len(keys) == len(set(keys)), "no record twice"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_any_moment(tmp_path, whole, seed):
    random_, folder = random.Random(seed), tmp_path / "run"
    def work():
        plain = TemplateWriter.__call__
        TemplateWriter.__call__ = lambda *a: (time.sleep(.005), plain(*a))[1]
        Engine(folder, SavedPages(PAGES)).run()
        os._exit(0)
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        time.sleep(random_.uniform(.005, .15))
        if process.is_alive(): os.kill(process.pid, signal.SIGKILL)
        process.join()
    Engine(folder, SavedPages(PAGES)).run()
    assert outputs(folder) == whole[2]


def test_steps_one_by_one_and_new_settings(tmp_path, whole):
    for step in STEPS: Engine(tmp_path, SavedPages(PAGES), workers=3).run(until=step)
    assert outputs(tmp_path) == whole[2]
    Engine(tmp_path, SavedPages(PAGES), settings=EngineSettings(fields=("biology",))).run()
    assert len(Records(tmp_path / "engine.jsonl")) == 1, "only what the settings ask for, though the journals know more"
    Engine(tmp_path, SavedPages(PAGES)).run()
    assert outputs(tmp_path) == whole[2]
    with pytest.raises(EngineError, match="until"): Engine(tmp_path, SavedPages(PAGES)).run(until="everything")


def test_pictures_of_which_nothing_is_known_are_not_even_fetched(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    text = "A lens is a thing of glass that many people use. " * 20
    (tmp_path / "in" / "a.html").write_text(f"<p>{text}<img src=a.png><figure><img src=a.png><figcaption>Lens</figure><img src=a.png alt='a small lens'>")
    (tmp_path / "in" / "pages.json").write_text('[{"file": "a.html", "title": "lens"}]')
    counts = Engine(tmp_path / "run", SavedPages(tmp_path / "in"), settings=EngineSettings(fields=("lens",))).run()
    assert counts["pictures"] == {"ok": 1, "failed": 2} and counts["records"]["ok"] == 1


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with alone(tmp_path):
        with pytest.raises(EngineError, match="another process"): Engine(tmp_path, SavedPages(PAGES)).run()
    Engine(tmp_path, SavedPages(PAGES)).run(until="topics")


def test_a_failing_writer_is_recorded_with_its_reason(tmp_path):
    with serving(lambda page: page.reply(b"no", 500)) as (here, asked):
        writer = EndpointWriter(here, "m", limits=replace(QUICK, tries=2), sleep=lambda _: None)
        engine = Engine(tmp_path, SavedPages(PAGES), TemplateWriter())
        engine.run(until="pictures")
        engine.writer = type("Mixed", (), {"name": "mixed", "__call__": lambda self, kind, facts: (TemplateWriter() if kind == "topics" else writer)(kind, facts)})()
        counts = engine.run()
        assert counts["questions"] == {"failed": 8} and len(asked) == 16 and counts["records"] == {"ok": 0, "failed": 0, "refused": 0}
        reasons = [line["reason"] for line in map(json.loads, open(tmp_path / "questions.jsonl"))]
        assert all("status 500" in reason and "tried 2 times" in reason for reason in reasons)
        engine.run()
        assert len(asked) == 16, "failed is failed, until it is to be tried again"


def test_saved_pages_stay_in_their_folder(tmp_path):
    (tmp_path / "secret.html").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.html").symlink_to(tmp_path / "secret.html")
    listed = [{"file": name, "title": "x"} for name in ("../secret.html", "/etc/hostname", "link.html", "none.html", "a\x00b")]
    (tmp_path / "in" / "pages.json").write_text(json.dumps(listed))
    source = SavedPages(tmp_path / "in")
    for one in listed:
        with pytest.raises(EngineError): source.page(one["file"])
    for address in ("../secret.html", "%2e%2e/secret.html", "/etc/hostname", "file:///etc/hostname", "http://a.org/x.png", "data:,x", "", "."):
        with pytest.raises(EngineError): source.picture(address, "link.html")
    for content, said in (("{", "expected a list"), ('[{"title": "x"}]', "page 0"), ('{"a": 1}', "page 0")):
        (tmp_path / "in" / "pages.json").write_text(content)
        with pytest.raises(EngineError, match=said): SavedPages(tmp_path / "in")
    with pytest.raises(EngineError, match="no such file"): SavedPages(tmp_path / "nowhere")


# ---- Wikipedia, played by a server of our own

PAGE = """<div class="mw-parser-output"><p>A <b>tide</b> is the slow rise and fall of the sea.{words}<sup class="reference">[1]</sup></p>
<figure typeof="mw:File/Thumb"><a href="/wiki/File:Free.png"><img src="//upload.example/wikipedia/commons/thumb/a/ab/Free.png/220px-Free.png" width="220"></a>
<figcaption>The sea at high tide</figcaption></figure>
<figure><img src="//upload.example/wikipedia/commons/a/ab/Drawing.svg"><figcaption>A drawing of the sea</figcaption></figure>
<figure><img src="//upload.example/wikipedia/en/a/ab/Logo.png"><figcaption>Not free</figcaption></figure>
<div class="navbox"><p>Navigation box</p></div></div>"""


def wiki(state):
    "A small MediaWiki with one page and three files."
    def answer(page):
        here = f"http://{page.headers['Host']}"
        if page.path.startswith("/files/"): page.reply(png(page.path[-6:-4] == "ng" and "red" or "blue")); return
        words = dict(urllib.parse.parse_qsl(page.path.partition("?")[2]))
        assert words["maxlag"] == "5" and words["format"] == "json" and "tests@example.org" in page.headers["User-Agent"]
        state["calls"] = state.get("calls", 0) + 1
        if state["calls"] == 1: found = {"error": {"code": "maxlag", "info": "Waiting for a server"}}
        elif words.get("list") == "search": found = {"query": {"search": [{"title": "Tide"}] if "tide" in words["srsearch"] else []}}
        elif words["action"] == "parse": found = {"parse": {"title": "Tide", "text": PAGE.format(words=" The sea moves." * 20)}}
        else:
            name = words["titles"].removeprefix("File:")
            licence = {"Free.png": "CC BY-SA 4.0", "Drawing.svg": "Public domain"}.get(name, "Fair use")
            info = {"url": f"{here}/files/{name}", "thumburl": f"{here}/files/{name}.png", "extmetadata": {
                "LicenseShortName": {"value": licence}, "Artist": {"value": "<a href='x'>Ada</a>"}}}
            found = {"query": {"pages": [{"title": words["titles"], "imageinfo": [info]}]}}
        page.reply(json.dumps(found).encode())
    return answer


def wiki_engine(folder, here):
    fetch = Fetcher(folder / "store", AGENT, QUICK, sleep=lambda _: None)
    return Engine(folder, Wikipedia(fetch, f"{here}/w/api.php"), settings=EngineSettings(fields=("tides", "operas"), pages=2))


def test_wikipedia(tmp_path):
    with serving(wiki({})) as (here, asked):
        counts = wiki_engine(tmp_path, here).run()
        assert counts["links"] == {"ok": 1, "failed": 1} and counts["pictures"] == {"ok": 2, "failed": 1}
        record = next(map(json.loads, open(tmp_path / "engine.jsonl")))
        assert (record["licence"], record["credit"], record["page_licence"]) == ("CC BY-SA 4.0", "Ada", "CC BY-SA 4.0")
        assert "Navigation box" not in (tmp_path / "pages.jsonl").read_text()
        failed = [line["reason"] for line in map(json.loads, open(tmp_path / "pictures.jsonl")) if line["status"] == "failed"]
        assert failed == ["Logo.png: found licence 'Fair use', expected a free one"]
        before = len(asked)
        wiki_engine(tmp_path, here).run()
        for path in (tmp_path / "journal").iterdir(): path.unlink()      # even without journals nothing is fetched twice
        again = wiki_engine(tmp_path, here).run()
        assert len(asked) == before and again == counts
        assert max(Counter(asked).values()) == 2 and sum(count == 2 for count in Counter(asked).values()) == 1, "only the busy one"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_wikipedia_killed_and_resumed_fetches_nothing_twice(tmp_path):
    with serving(wiki({"calls": 1})) as (here, asked):
        def attempt(at, point):
            def work(): dying(point, at); wiki_engine(tmp_path / "run", here).run(); os._exit(0)
            return work
        statuses = [in_child(attempt(at, point)) for point in ("line", "line after", "torn line", "replace after") for at in (1, 2, 4)]
        assert statuses.count(9) >= 6
        wiki_engine(tmp_path / "run", here).run()
        assert max(Counter(asked).values()) == 1
    with serving(wiki({"calls": 1})) as (here, _):
        wiki_engine(tmp_path / "whole", here).run()
    made, other = ((tmp_path / name / "engine.jsonl").read_bytes() for name in ("run", "whole"))
    assert made == other


@pytest.mark.parametrize("body, said", [(b"<html>", "expected JSON"), (b"[]", "expected an object"), (b'{"error": {"code": "missingtitle"}}', "missingtitle"),
                                        (b'{"error": "x"}', "x"), (b"[" * 90_000, "expected JSON")])
def test_an_api_that_answers_rubbish(tmp_path, body, said):
    with serving(lambda page: page.reply(body)) as (here, _):
        with pytest.raises(FetchError, match=said): Wikipedia(Fetcher(tmp_path, AGENT, replace(QUICK, tries=2), sleep=lambda _: None), here).find("x", 1)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()], "rubbish is not kept"
    with serving(lambda page: page.reply(b"{}")) as (here, _):
        source = Wikipedia(Fetcher(tmp_path, AGENT, QUICK), here)
        assert source.find("x", 1) == []
        for call in (lambda: source.page("x"), lambda: source.picture("//a/b/X.png", "x")):
            with pytest.raises(FetchError): call()


def test_file_titles():
    assert file_title("//u/wikipedia/commons/thumb/a/ab/A%20b.svg/220px-A%20b.svg.png") == "A b.svg"
    for bad in ("", "http://a.org/", "//u/x", "//u/a%7Cb.png", "//u/..%2F..%2Fx.png", "//u/" + "a" * 400 + ".png"):
        with pytest.raises(FetchError): file_title(bad)


# ---- re-writing

def photos(folder):
    lines = [{"id": "a", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": "teal"}]},
             {"id": "b", "conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "word " * 30}]},
             {"id": "c", "conversations": []},
             {"id": "d", "image": ["a.png", "a.png"], "conversations": [{"from": "human", "value": "<image>\nSame as\n<image>?"}, {"from": "gpt", "value": "yes"}]}]
    (folder / "a.png").write_bytes(png())
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Records(folder / "in.jsonl")


@pytest.mark.parametrize("kind, ok", [("long", 2), ("chat", 3)])
def test_rewriting_keeps_pictures_and_names_failures(tmp_path, kind, ok):
    records = photos(tmp_path)
    assert rewrite(records, tmp_path / "out", TemplateWriter(), kind) == {"ok": ok, "failed": 4 - ok}
    made = Records(tmp_path / "out" / f"{kind}.jsonl", tmp_path)
    assert check_records(made).ok and [len(made[i].images) for i in range(ok)] == ([1, 2] if kind == "long" else [1, 0, 2])
    reasons = [line["reason"] for line in map(json.loads, open(tmp_path / "out" / f"{kind}_lines.jsonl")) if line["status"] == "failed"]
    assert any("record 2" in reason for reason in reasons)
    with pytest.raises(EngineError, match="expected long or chat"): rewrite(records, tmp_path, TemplateWriter(), "poem")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_rewriting_goes_on_after_a_kill(tmp_path):
    records = photos(tmp_path)
    rewrite(records, tmp_path / "whole", TemplateWriter(), "chat")
    def attempt(at): return lambda: (dying("line", at), rewrite(records, tmp_path / "run", TemplateWriter(), "chat"), os._exit(0))
    assert [in_child(attempt(at)) for at in (1, 2, 2)] == [9, 9, 9]
    rewrite(records, tmp_path / "run", TemplateWriter(), "chat")
    assert (tmp_path / "run" / "chat.jsonl").read_bytes() == (tmp_path / "whole" / "chat.jsonl").read_bytes()


def test_the_drawn_pictures_are_those_of_their_program(tmp_path):
    "data_samples/pages/draw.py draws what is shipped."
    program = tmp_path / "draw.py"
    program.write_text((PAGES / "draw.py").read_text())
    subprocess.run([sys.executable, str(program)], check=True)
    for path in (PAGES / "pictures").glob("*.png"):
        if path.stem != "torn":
            with Image.open(path) as one, Image.open(tmp_path / "pictures" / path.name) as other:
                difference = np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float))
                assert difference.mean() < 3, f"{path.name}: Pillow versions draw edges a little differently, not more"
