"""Talking to models: answers against transformers' own generate, what a run offers, a terminal and a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from rich.console import Console

from megatron_cpt.chat.session import Session
from megatron_cpt.chat.speaker import Answer, Sampling, Speaker, load_speaker
from megatron_cpt.chat.voices import Voice, find_voices
from megatron_cpt.errors import CheckpointError, ConfigError, CptError
from tests.configs import tiny_run
from tests.rank_pool import RankPool
from tests.synthetic_model import write_model
from tests.unit.corpus.conftest import TEXTS, build_tokenizer, write_jsonl

VOCAB = 403
GREEDY = Sampling(temperature=0, max_tokens=24)
PROMPT = "Continued pre-training"


def write_talker(folder: Path, seed: int) -> Path:
    write_model(folder, seed=seed, vocab_size=VOCAB)
    build_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def work(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and two runs of some steps from it: `whole` and, of adapters, `lora`."""
    folder = tmp_path_factory.mktemp("chat")
    write_talker(folder / "model", seed=0)
    write_jsonl(folder / "text.jsonl", [f"{text} {number}" for number in range(40) for text in TEXTS])
    made = _command(
        "preprocess",
        "--input",
        folder / "text.jsonl",
        "--output-prefix",
        folder / "data",
        "--tokenizer",
        folder / "model",
    )
    assert made.returncode == 0, made.stderr
    for name, more in {"whole": {}, "lora": {"lora": {"rank": 4, "alpha": 64.0}}}.items():
        config = tiny_run(folder, run_dir=str(folder / name), optimizer={"lr": 1e-2}, **more)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        log = folder / f"{name}.log"
        assert pool.run(folder / f"{name}.yaml", ranks=1, log=log) == [0], log.read_text()[-3000:]
    return folder


def said(speaker: Speaker, sampling: Sampling, prompt: str = PROMPT) -> tuple[str, Answer]:
    answer = Answer()
    pieces = list(speaker.say(speaker.prompt_ids(prompt), sampling, answer))
    assert "".join(pieces) == answer.text
    return answer.text, answer


def expected(folder: Path, model: Any = None) -> str:
    """transformers' own greedy continuation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = model or transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=GREEDY.max_tokens)[0]
    return str(tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_run_offers_its_checkpoint_and_its_base_and_is_exported_once(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    newest, base = find_voices(work / "whole")
    assert (newest.kind, base.path) == ("checkpoint", work / "model")
    trained = load_speaker(newest)
    assert trained.folder == work / "whole" / "export" / newest.path.name
    assert said(trained, GREEDY)[0] == expected(trained.folder) != expected(work / "model")
    assert "exporting" in caplog.text
    caplog.clear()
    assert load_speaker(find_voices(work / "whole")[0]).folder == trained.folder
    assert "exporting" not in caplog.text
    shutil.move(trained.folder, work / "moved")  # beside the run, it is found by its receipt
    try:
        assert find_voices(work / "whole")[0].export == work / "moved"
        assert [voice.kind for voice in find_voices(work / "moved")] == ["model"]
    finally:
        shutil.move(work / "moved", trained.folder)


def test_adapters_answer_as_the_model_that_they_are_merged_into(work: Path) -> None:
    (newest, _) = find_voices(work / "lora")
    speaker = load_speaker(newest)
    assert sorted(path.name for path in speaker.folder.glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    words = [sys.executable, "-m", "megatron_cpt", "merge-lora", str(work / "lora"), str(work / "merged")]
    subprocess.run(words, check=True, capture_output=True)
    assert said(speaker, GREEDY)[0] == expected(work / "merged") != expected(work / "model")
    (alone, base) = find_voices(speaker.folder)
    assert (alone.kind, alone.base, base.path) == ("adapters", work / "model", work / "model")
    with pytest.raises(CptError, match="base model is not where they say"):
        load_speaker(replace(alone, base=None))


def test_the_same_seed_gives_the_same_text_and_a_stop_token_ends_it(work: Path) -> None:
    speaker = load_speaker(Voice("model", work / "model", "model"))
    drawn = Sampling(temperature=1.5, max_tokens=24, seed=7)
    first, answer = said(speaker, drawn)
    assert first == said(speaker, drawn)[0] != said(speaker, replace(drawn, seed=8))[0]
    assert (answer.tokens, answer.ended_by) == (24, "max_tokens") and answer.seconds > 0
    ids = [int(token) for token in speaker._next_tokens(speaker.prompt_ids(PROMPT), drawn, _seeded(7), 24)]
    speaker.stop_ids = frozenset([ids[5]])
    shorter, answer = said(speaker, drawn)
    assert first.startswith(shorter) and answer.ended_by == "stop token"
    assert answer.tokens == ids.index(ids[5])
    _, answer = said(speaker, replace(drawn, max_tokens=10_000))
    assert answer.tokens <= 512


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_what_fills_the_context_ends_there(work: Path) -> None:
    speaker = load_speaker(Voice("model", work / "model", "model"))
    speaker.stop_ids = frozenset()
    prompt = speaker.prompt_ids("word " * 600)[:505]
    answer = Answer()
    list(speaker.say(prompt, replace(GREEDY, max_tokens=100), answer))
    assert (answer.tokens, answer.ended_by, answer.prompt_tokens) == (7, "context", 505)


@pytest.fixture
def session(work: Path) -> Session:
    (work / "whole" / "export").mkdir(exist_ok=True)
    console = Console(file=io.StringIO(), width=40)
    return Session(find_voices(work / "whole"), load_speaker, console, GREEDY)


def printed(session: Session) -> str:
    file = session.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_session_compares_counts_saves_and_changes_models(session: Session, tmp_path: Path) -> None:
    session.handle("/compare")
    session.handle(PROMPT)
    (exchange,) = session.exchanges
    base, tuned = exchange.answers.values()
    assert list(exchange.answers) == [session.voices[-1].name, session.voices[0].name] and base.text != tuned.text
    session.handle("/compare")
    session.handle("/model 2")
    session.handle("/set max_tokens 3")
    session.handle(PROMPT)
    assert list(session.exchanges[1].answers) == ["base"] and session.exchanges[1].answers["base"].tokens == 3
    session.handle("/stats")
    assert "base: 2 answers, 27 tokens" in printed(session)
    session.handle(f"/save {tmp_path / 'talk.json'}")
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [row["sampling"]["max_tokens"] for row in saved] == [24, 3]
    assert saved[0]["answers"]["base"]["text"] == base.text
    assert session.handle("/quit") is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set temperature hot", "temperature 'hot' is not a number from 0 to 10"),
        ("/set temperature nan", "is not a number"),
        ("/set max_tokens 0", "is not a whole number from 1"),
        ("/set top_p 1.5", "is not a number"),
        ("/set temprature 1", "no such setting"),
        ("/set chat maybe", "neither on nor off"),
        ("/model 9", "no model 9"),
        ("/save", "needs the name of a file"),
        ("/save /dev/null/talk.json", "/dev/null/talk.json"),
        ("/comapre", "no command /comapre"),
    ],
)
def test_a_mistake_is_one_message_and_changes_nothing(session: Session, line: str, message: str) -> None:
    before = (session.sampling, session.chosen, session.chat, session.compare)
    with pytest.raises(CptError, match=message) as caught:
        session.handle(line)
    assert caught.value.hint
    assert (session.sampling, session.chosen, session.chat, session.compare) == before


def test_turns_need_a_template_and_then_remember(session: Session, work: Path) -> None:
    session.handle("/set chat on")
    with pytest.raises(ConfigError, match="has no chat template"):
        session.handle("hello")
    speaker = session._listening()[0]
    speaker.tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}"
    session.handle("hello")
    session.handle("again")
    first, second = (exchange.answers[speaker.voice.name] for exchange in session.exchanges)
    assert second.prompt_tokens > first.prompt_tokens + first.tokens
    session.handle("/clear")
    session.handle("hello")
    assert session.exchanges[-1].answers[speaker.voice.name].text == first.text


def test_folders_that_cannot_answer_are_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "export.partial").mkdir()
    with pytest.raises(CheckpointError, match="not finished"):
        find_voices(tmp_path / "export.partial")
    with pytest.raises(CheckpointError, match="no run and no Hugging Face folder"):
        find_voices(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        find_voices(tmp_path / "none")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(work / "whole" / "resolved.yaml", tmp_path / "run" / "resolved.yaml")
    with pytest.raises(CheckpointError, match="no complete checkpoint and no export"):
        find_voices(tmp_path / "run")


def _command(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_cpt", *map(str, words)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


def test_a_pipe_gets_one_answer_per_line(work: Path, tmp_path: Path) -> None:
    greedy = ("--temperature", "0", "--max-tokens", "24")
    text = _command("generate", work / "model", PROMPT, *greedy)
    assert (text.returncode, text.stdout) == (0, expected(work / "model") + "\n"), text.stderr
    piped = _command("chat", work / "whole", "--compare", "--json", *greedy, stdin=f"{PROMPT}\nSecond\n")
    rows = [json.loads(line) for line in piped.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == [PROMPT, "Second"], piped.stderr
    assert rows[0]["answers"]["base"]["text"] == expected(work / "model")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"promt": "two"}\n')
    wrong = _command("chat", work / "model", "--prompts", tmp_path / "p.jsonl", "--json")
    assert wrong.returncode == 2 and "p.jsonl:2: no prompt" in wrong.stderr and "Traceback" not in wrong.stderr
    bad = _command("generate", work / "model", PROMPT, "--top-p", "2")
    assert bad.returncode == 2 and "top_p '2' is not a number" in bad.stderr


def test_on_a_terminal_ctrl_c_ends_the_answer_and_not_the_program(work: Path) -> None:
    words = [sys.executable, "-m", "megatron_cpt", "chat", str(work / "model"), "--max-tokens", "500"]
    pid, ours = pty.fork()
    if pid == 0:
        os.execve(sys.executable, words, {**os.environ, "TERM": "xterm", "COLUMNS": "40"})
    seen = _until(ours, "", "/help lists the commands")
    os.write(ours, b"/set temprature 1\n")
    seen = _until(ours, seen, "did you mean temperature?")
    os.write(ours, b"/set temperature 2\nhello\n")
    seen = _until(ours, seen, "loading")
    before = len(seen)
    while len(seen) < before + 200:  # it speaks
        seen = _more(ours, seen)
    os.write(ours, b"\x03")
    seen = _until(ours, seen, "(ended)")
    os.write(ours, b"/stats\n")
    seen = _until(ours, seen, "1 answers")
    os.write(ours, b"/quit\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _more(terminal: int, seen: str) -> str:
    ready, _, _ = select.select([terminal], [], [], 60)
    assert ready, f"nothing more after: {seen[-500:]}"
    return seen + os.read(terminal, 4096).decode(errors="replace")


def _until(terminal: int, seen: str, words: str) -> str:
    deadline, begin = time.monotonic() + 120, len(seen)
    while words not in seen[begin:]:
        assert time.monotonic() < deadline, f"{words!r} did not come: {seen[-500:]}"
        seen = _more(terminal, seen)
    return seen
