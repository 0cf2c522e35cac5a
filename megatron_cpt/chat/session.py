"""A conversation: lines that are prompts, and lines that are commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_cpt.chat.screen import show_answers
from megatron_cpt.chat.speaker import Answer, Sampling, Speaker, same_tokens
from megatron_cpt.chat.voices import Voice
from megatron_cpt.config.problems import near_match
from megatron_cpt.durable import write_output
from megatron_cpt.errors import ConfigError, CptError

HELP = """\
TEXT              continued by the model; with /set chat on, answered in turns by its chat template
/compare          both models answer, side by side; again: one does
/model [N]        the models that there are; take number N
/set NAME VALUE   temperature (0: the likeliest token), top_p, max_tokens, seed, chat (on, off); without NAME: all
/clear            begin a new conversation
/stats            tokens and seconds so far, by model
/save FILE        everything so far, as JSON
/help             this
/quit             leave; so does Ctrl-D. Ctrl-C ends an answer"""
_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0, 10), "top_p": (1e-6, 1), "max_tokens": (1, 1_000_000), "seed": (0, 2**63 - 1),
}  # fmt: skip


@dataclass
class Exchange:
    """A prompt and what each model said to it."""

    prompt: str
    sampling: Sampling
    chat: bool
    answers: dict[str, Answer]  # by the model's name

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "chat": self.chat,
            "sampling": asdict(self.sampling),
            "answers": {
                name: asdict(answer) | {"tokens_per_second": round(answer.tokens_per_second, 2)}
                for name, answer in self.answers.items()
            },
        }


@dataclass
class Session:
    """What a conversation needs to know from one line to the next.

    Attributes:
        voices: what there is to talk to, the base model last where there is one.
        load: voice -> speaker; called once for each.
    """

    voices: Sequence[Voice]
    load: Callable[[Voice], Speaker]
    console: Console
    sampling: Sampling = field(default_factory=Sampling)
    compare: bool = False
    chat: bool = False
    chosen: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    _turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    _speakers: dict[str, Speaker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.compare:
            self._check_pair()

    def handle(self, line: str) -> bool:
        """Do what `line` asks for. Return whether the conversation goes on.

        Raises:
            CptError: what was asked for cannot be done; nothing has changed.
        """
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            self.ask(line)
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "set": self._set, "compare": self._compare, "model": self._model, "stats": self._stats,
            "save": self._save, "clear": lambda _: self._turns.clear(), "help": lambda _: self._print(HELP),
        }  # fmt: skip
        if name not in commands:
            near = near_match(name, commands)
            raise ConfigError(f"no command /{name}", hint=f"did you mean /{near}?" if near else "/help lists them")
        commands[name](rest.strip())
        return True

    def ask(self, prompt: str) -> Exchange:
        """Put `prompt` to the model, or to both, and show the answers as they come.

        Ctrl-C ends what is being said; what was said until then is kept.
        """
        speakers = self._listening()
        ids = [self._ids(speaker, prompt) for speaker in speakers]
        answers = {speaker.voice.name: Answer() for speaker in speakers}
        pieces = [
            speaker.say(tokens, self.sampling, answers[speaker.voice.name])
            for speaker, tokens in zip(speakers, ids, strict=True)
        ]
        if not show_answers(self.console, answers, pieces):
            for answer in answers.values():
                answer.ended_by = "interrupt"
        exchange = Exchange(prompt, self.sampling, self.chat, answers)
        self.exchanges.append(exchange)
        if self.chat:
            for name, answer in answers.items():
                turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.text}]
                self._turns[name] = [*self._turns.get(name, []), *turns]
        return exchange

    def _ids(self, speaker: Speaker, prompt: str) -> list[int]:
        if not self.chat:
            return speaker.prompt_ids(prompt)
        return speaker.turn_ids([*self._turns.get(speaker.voice.name, []), {"role": "user", "content": prompt}])

    def _listening(self) -> list[Speaker]:
        """The chosen model, and the base beside it where they are compared; loaded when first spoken to."""
        voices = [self.voices[-1], self.voices[self.chosen]] if self.compare else [self.voices[self.chosen]]
        for voice in voices:
            if voice.name not in self._speakers:
                self._speakers[voice.name] = self.load(voice)
                self._warn_of_other_tokens(voice.name)
        speakers = [self._speakers[voice.name] for voice in voices]
        if len(speakers) == 2 and same_tokens(*speakers):  # what ends a document of one ends it for both
            stops = speakers[0].stop_ids | speakers[1].stop_ids
            for speaker in speakers:
                speaker.stop_ids = stops
        return speakers

    def _warn_of_other_tokens(self, name: str) -> None:
        first, *others = self._speakers.values()
        if others and not same_tokens(first, self._speakers[name]):
            self._print(f"note: {name} has another tokenizer than {first.voice.name}; each reads the text with its own")

    def _compare(self, _rest: str) -> None:
        if not self.compare:
            self._check_pair()
        self.compare = not self.compare
        self._print(f"{'both models answer' if self.compare else f'{self.voices[self.chosen].name} answers'}")

    def _check_pair(self) -> None:
        if len(self.voices) < 2:
            raise ConfigError("there is one model alone to talk to", hint="start chat with --base DIR")
        if self.chosen == len(self.voices) - 1:
            raise ConfigError("the base model would be compared with itself", hint="/model 1 takes another")

    def _model(self, rest: str) -> None:
        if rest:
            number = int(rest) if rest.isdigit() else 0
            if not 1 <= number <= len(self.voices):
                raise ConfigError(f"no model {rest}", hint=f"/model lists them: 1 to {len(self.voices)}")
            if self.compare and number == len(self.voices):
                raise ConfigError("the base model would be compared with itself", hint="/compare first ends that")
            self.chosen = number - 1
        for number, voice in enumerate(self.voices, 1):
            mark = "*" if number - 1 == self.chosen else " "
            self._print(f"{mark} {number}  {voice.name}  {voice.path}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        value = value.strip()
        names = ["chat", *(one.name for one in fields(Sampling))]
        if name and name not in names:
            near = near_match(name, names)
            raise ConfigError(
                f"/set {name}: no such setting", hint=f"did you mean {near}?" if near else ", ".join(names)
            )
        if name == "chat":
            if value not in ("on", "off"):
                raise ConfigError(f"/set chat {value!r} is neither on nor off", hint="/set chat on")
            self.chat = value == "on"
            self._turns.clear()
        elif name:
            changed: dict[str, Any] = {name: setting(name, value)}
            self.sampling = replace(self.sampling, **changed)
        settings = asdict(self.sampling) | {"chat": "on" if self.chat else "off"}
        self._print(
            "  ".join(f"{key} {one:g}" if isinstance(one, float) else f"{key} {one}" for key, one in settings.items())
        )

    def _stats(self, _rest: str) -> None:
        names = dict.fromkeys(name for exchange in self.exchanges for name in exchange.answers)
        if not names:
            self._print("nothing was said yet")
        for name in names:
            said = [exchange.answers[name] for exchange in self.exchanges if name in exchange.answers]
            tokens, seconds = sum(answer.tokens for answer in said), sum(answer.seconds for answer in said)
            rate = tokens / seconds if seconds else 0.0
            self._print(f"{name}: {len(said)} answers, {tokens:,} tokens in {seconds:.1f} s, {rate:.1f} tokens/s")

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save needs the name of a file", hint="/save talk.json")
        path = Path(rest).expanduser()
        if path.exists():
            raise ConfigError(f"{path} exists", hint="name another file")
        text = json.dumps([exchange.to_json() for exchange in self.exchanges], indent=1, ensure_ascii=False) + "\n"
        write_output(path, text.encode(), hint="name a file in a folder that can be written")
        self._print(f"wrote {path}: {len(self.exchanges)} exchanges")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


def setting(name: str, text: str) -> float | int:
    """Return the value of a setting.

    Raises:
        ConfigError: it is no number, or not one that is allowed.
    """
    low, high = _LIMITS[name]
    whole = name in ("max_tokens", "seed")
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise ConfigError(f"{name} {text!r} is not a {kind} from {low:g} to {high:g}", hint=f"{name} {_example(name)}")
    return value


def _example(name: str) -> str:
    return f"{getattr(Sampling(), name):g}"


def said(error: CptError) -> str:
    """An error within a conversation, in one or two lines."""
    return f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "")
