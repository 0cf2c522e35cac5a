"""Texts on which a fast tokenizer has to equal its reference before it may be used."""

from __future__ import annotations

import random

_SCRIPTS = (
    "The quick brown fox can't jump; we'll see, they've said: \"I'm 42.5% sure\" -- it's 3 o'clock.",
    "Ärger über Größe, façade naïve, coöperate, El Niño, smørrebrød, Łódź, İstanbul, ſharp ß",
    "继续预训练是在领域文本上接着训练大语言模型。第一条　为了保护当事人的合法权益，制定本法！",
    "日本語のテキストとカタカナ、ひらがな。한국어 문장도 있습니다. ไทยไม่มีช่องว่าง",
    "Привет, мир! Καλημέρα κόσμε. مرحبا بالعالم ١٢٣ שלום עולם हिन्दी में पाठ",
    "e\u0301 vs é, \u212b vs Å, ﬁ ligature, ½ ² ①, \u200bzero\u200dwidth\ufeff, \u00a0nbsp\u3000ideographic",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱 \U0010fffd",
    "def f(x: int) -> str:\n\treturn f'{x:>08b}'  # comment\r\n\r\n\n    if x != 0x1F:\n        pass\n",
    "https://example.org/a?b=c&d=%20e#f  user@example.org  C:\\dir\\file.txt  $1,234,567.89  2024-02-29T12:00:00Z",
    "", " ", "\n", "   leading", "trailing   ", "tabs\t\tand\n\n\nnewlines\r\n \r mixed \u2028\u2029\u0085",
    "a" * 300, "ab " * 200, "1234567890" * 30, "!?" * 100, "\x00\x01\x1f\x7f",
    "<|endoftext|> spelled <|im_start|>user\nhi<|im_end|> <s> </s> <unk> <tool_call>{}</tool_call> <|fim_prefix|>",
)  # fmt: skip


def _random_texts(count: int) -> list[str]:
    """Deterministic nonsense over the code points where pre-tokenizer expressions differ most easily."""
    rng = random.Random(20240229)
    ranges: tuple[tuple[int, int], ...]
    ranges = ((32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x530), (0x2000, 0x2070), (0x3000, 0x3100))
    ranges += ((0x4E00, 0x9FFF), (0x1F300, 0x1F600))

    def text() -> str:
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 60)))

    return [text() for _ in range(count)]


SELF_CHECK_SAMPLE: tuple[str, ...] = (*_SCRIPTS, *_random_texts(400))
