"""Clean the Unicode text of a document."""

import re
import unicodedata

_LINE_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Between two words they may be all that parts them.
_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Byte order marks, lone surrogates (JSON can escape them; UTF-8 can't hold them) and code points that Unicode
# reserves as "not a character". Joiners stay: scripts and emoji need them.
_REMOVED = re.compile("[\ufeff\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def clean(text: str) -> str:
    """Make line breaks ``\\n`` and control characters spaces, drop lone surrogates, compose (NFC), strip.

    Returns:
        The cleaned text; "" if nothing a reader could see is left in it.
    """
    if not text.replace("\n", " ").isprintable():  # removed characters are not, and this check is fast
        text = _REMOVED.sub("", _CONTROLS.sub(" ", _LINE_BREAKS.sub("\n", text)))
    text = unicodedata.normalize("NFC", text).strip()
    if any(unicodedata.category(character)[0] not in "CZ" for character in text):
        return text
    return ""
