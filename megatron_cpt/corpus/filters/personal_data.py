"""Personal data masked in text by patterns with a check behind them (Luhn, octets, issued ranges).

    john@example.org -> [EMAIL]   +1 212 555 0123 -> [PHONE]   192.0.2.7 -> [IP]   123-45-6789 -> [ID]
    4111 1111 1111 1111 -> [CARD]

Each pattern is tried only on texts that can hold it, so that text without digits or @ costs next to nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

_EMAIL = re.compile(
    r"\b[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b"
)
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_SSN = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_CARD = re.compile(r"(?<![\d-])(?:\d[ -]?){12,18}\d(?![\d-])")
# International with a plus; North American with separators; Chinese mobile numbers.
_PHONE = re.compile(
    r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}|1[3-9]\d{9})(?![\w-]|\.\d)"
)
_DIGIT = re.compile(r"\d")


def _luhn(digits: str) -> bool:
    """The check digit of payment cards."""
    total = 0
    for place, char in enumerate(reversed(digits)):
        value = int(char) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def mask_emails(text: str) -> str:
    return _EMAIL.sub("[EMAIL]", text) if "@" in text else text


def mask_ips(text: str) -> str:
    def masked(match: re.Match[str]) -> str:
        try:
            ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        return match[0] if match[0] in ("::", "::1", "127.0.0.1", "0.0.0.0") else "[IP]"

    text = _IPV4.sub(masked, text) if text.count(".") >= 3 else text
    return _IPV6.sub(masked, text) if text.count(":") >= 2 else text


def mask_ssns(text: str) -> str:
    return _SSN.sub("[ID]", text) if "-" in text else text


def mask_cards(text: str) -> str:
    def masked(match: re.Match[str]) -> str:
        digits = re.sub(r"[ -]", "", match[0])
        return "[CARD]" if digits[0] in "3456" and len(set(digits)) > 1 and _luhn(digits) else match[0]

    return _CARD.sub(masked, text)


def mask_phones(text: str) -> str:
    return _PHONE.sub("[PHONE]", text)


# In this order: a card or an SSN must not be taken for a phone number.
_MASKS: dict[str, Callable[[str], str]] = {
    "email": mask_emails, "card": mask_cards, "ssn": mask_ssns, "ip": mask_ips, "phone": mask_phones,
}  # fmt: skip


def masker(kinds: Sequence[str]) -> Callable[[str], str]:
    """One function that masks the kinds asked for."""
    chosen = [(kind, mask) for kind, mask in _MASKS.items() if kind in kinds]

    def mask(text: str) -> str:
        has_digit = _DIGIT.search(text) is not None
        for kind, function in chosen:
            if has_digit or kind in ("email", "ip"):
                text = function(text)
        return text

    return mask
