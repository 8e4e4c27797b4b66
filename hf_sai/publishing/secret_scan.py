"""Looks for secrets in files that are about to be public: text of any encoding, and what binaries say of themselves.

Shapes and assignments are those of detect-secrets (``pip install "hf-sai[hub]"``), Hugging Face's tokens and what
:mod:`hf_sai.runs.redact` knows beside them. Nothing is sent anywhere to try a secret out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_sai.runs.redact import REDACTED, is_secret_name, named_values, shaped_secrets

__all__ = ["find_secret"]

#: Detectors of detect-secrets that tell by the shape alone. Those left out take hashes, words of vocabularies or
#: addresses for secrets.
_SHAPES = (
    *("AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector", "DiscordBotTokenDetector"),
    *("GitHubTokenDetector", "GitLabTokenDetector", "IbmCloudIamDetector", "IbmCosHmacDetector", "JwtTokenDetector"),
    *("MailchimpDetector", "NpmDetector", "OpenAIDetector", "PrivateKeyDetector", "PypiTokenDetector"),
    *("SendGridDetector", "SlackDetector", "SoftlayerDetector", "SquareOAuthDetector", "StripeDetector"),
    *("TelegramBotTokenDetector", "TwilioKeyDetector"),
)
_ENCRYPTED_KEY = re.compile(r"BEGIN (?:ENCRYPTED |[A-Z0-9]+ )?PRIVATE KEY")
#: Word lists, in which names and values are words of a language.
_VOCABULARIES = re.compile(
    r"(?:.*/)?(?:tokenizer|vocab[\w-]*|\w*_vocab|added_tokens|byte_maps|word_\w+)\.json", re.ASCII
)
#: What a model wrote, which may be a program with a made-up password.
_WRITTEN_BY_MODELS = re.compile(r"(?:samples/.*|sample)\.txt")
_PROSE = (
    *("", ".md", ".txt", ".rst", ".html", ".ipynb", ".log", ".out"),
    *(".yaml", ".yml", ".toml", ".sh", ".cfg", ".conf", ".ini", ".properties"),
)
_CODE = (".py", ".jinja")
#: What stands for a value in a program, a shell or an explanation: a variable, a call, None.
_REFERENCE = re.compile(r"[A-Za-z_]+(?:\.[A-Za-z_]+)*[\[(].*|[A-Za-z_]+(?:\.[A-Za-z_]+)+|[A-Z_]+|\$(?:[A-Z_]+|[({].*)")
_PLACEHOLDER = re.compile(r"<.*>|\$\{?\w+\}?|\{.*\}|%\(?\w+\)?s?|.*(?:your|example|xxx|\.\.\.|\*\*\*).*", re.IGNORECASE)
_MARKS = (
    *((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")),
    *((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")),
)
#: A string of JSON with a backslash in it.
_ESCAPED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)+"', re.DOTALL)
#: A line of a file of settings, such as ~/.aws/credentials.
_SETTING = re.compile(r"^[ \t]*([A-Za-z_][\w.-]*)[ \t]+=[ \t]+([^\s()\[\]{}\"']{8,})[ \t]*$", re.MULTILINE)
_CHUNK, _OVERLAP = 2**24, 2**12
_MAX_HEADER = 100 * 2**20
_MAX_MEMBER = 2**28
_PNG = b"\x89PNG\r\n\x1a\n"
_RUNS = re.compile(rb"[\t\x20-\x7e]{8,}|(?:[\t\x20-\x7e]\x00){8,}|(?:\x00[\t\x20-\x7e]){8,}")


def find_secret(path: Path, name: str, secrets: Iterable[str] = ()) -> tuple[str, str] | None:
    """The first secret in a file.

    Args:
        path: The file.
        name: Its path in the repository, which says what kind of file it is.
        secrets: Strings that no file may hold.

    Returns:
        Where it is (``line 3``, ``the header``, ``its name``) and what it is; never the secret itself. None where there
        is none.

    Raises:
        ImportError: detect-secrets is missing.
        OSError: The file cannot be read.
    """
    detectors, hidden = _detectors(), tuple(secrets)
    for place, text in itertools.chain([("its name", name)], _texts(path)):
        found = _kind(text, hidden, detectors)
        if found is None and place is None:
            found = _named(text, name)
        if found is not None:
            position, what = found
            return place or f"line {text.count(chr(10), 0, position) + 1}", what
    return None


def _kind(text: str, secrets: tuple[str, ...], detectors: list[Any]) -> tuple[int, str] | None:
    """Position and kind of the first secret that its shape gives away."""
    found = [(text.find(secret), "an access token of this machine") for secret in secrets if secret in text]
    found += [(start, "an access token") for start in shaped_secrets(text)]
    found += [(match.start(), "a private key") for match in _ENCRYPTED_KEY.finditer(text)]
    for detector in detectors:
        for value in detector.analyze_string(text):
            start = text.find(value)
            if start >= 0 and _stands_alone(text, start, value) and not _PLACEHOLDER.fullmatch(value):
                found.append((start, f"what looks like one ({detector.secret_type})"))
    return min(found, default=None)


def _stands_alone(text: str, start: int, value: str) -> bool:
    """Whether the match is no part of a longer run, such as base64 of a table."""
    around = text[max(0, start - 1) : start], text[start + len(value) : start + len(value) + 1]
    return not (value.isalnum() and any(char.isalnum() or char in "+/" for char in around if char))


def _named(text: str, name: str) -> tuple[int, str] | None:
    """Position and kind of the first value that its name gives away."""
    suffix = Path(name).suffix.lower()
    if _VOCABULARIES.fullmatch(name) or _WRITTEN_BY_MODELS.fullmatch(name) or Path(name).name == "merges.txt":
        return None
    if suffix == ".json":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = None
        for key, value in _entries(content):
            if is_secret_name(key, value) and not _is_harmless(value):
                return max(text.find(json.dumps(key)), 0), f"a value of {key!r}"
        for key, value in _strings(content):
            for _, option, inner in named_values(value):
                if not _is_harmless(inner):
                    return max(text.find(json.dumps(value)), 0), f"a value of {option!r} (in {key!r})"
    if suffix in _PROSE:
        for start, option, value in named_values(text):
            if not _is_harmless(value) and not _is_reference(value):
                return start, f"a value of {option!r}"
        for match in _SETTING.finditer(text):
            is_word = re.fullmatch(r"\D+|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", match[2])  # as a program's: self.token
            if is_secret_name(match[1], match[2]) and not _is_harmless(match[2]) and not is_word:
                return match.start(), f"a value of {match[1]!r}"
    return _assigned(text, name) if suffix in (*_CODE, *_PROSE) else None


def _assigned(text: str, name: str) -> tuple[int, str] | None:
    """A password that a program assigns; a comment ``pragma: allowlist secret`` on the line says that it is none."""
    from detect_secrets.filters import heuristic
    from detect_secrets.plugins.keyword import KeywordDetector

    detector, position = KeywordDetector(), 0
    for line in text.splitlines(keepends=True):
        if "pragma: allowlist secret" not in line and len(line) < 2000 and not heuristic.is_indirect_reference(line):
            for secret in detector.analyze_line(filename=f"{name}.py", line=line, line_number=1):
                value = secret.secret_value or ""
                doubtful = heuristic.is_not_alphanumeric_string(value) or heuristic.is_templated_secret(value)
                if not doubtful and not _is_harmless(value) and not value.isspace():
                    return position, f"what looks like one ({detector.secret_type})"
        position += len(line)
    return None


def _is_harmless(value: str) -> bool:
    return len(value) < 3 or REDACTED in value or _PLACEHOLDER.fullmatch(value) is not None


def _is_reference(value: str) -> bool:
    bare = value.strip("`)")
    named = bare.isidentifier() and bare == bare.lower() and ("_" in bare or is_secret_name(bare))
    return bool(named or bare.lower() in ("", "none", "null") or _is_harmless(bare) or _REFERENCE.fullmatch(bare))


def _entries(content: Any) -> Iterator[tuple[str, str]]:
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, str):
                yield str(key), value
            else:
                yield from _entries(value)
    elif isinstance(content, list):
        for value in content:
            yield from _entries(value)


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for inner, value in content.items():
            # What a model wrote or was asked is no setting.
            if inner not in ("text", "prompt", "messages", "chat_template"):
                yield from _strings(value, str(inner))
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value, key)


def _texts(path: Path) -> Iterator[tuple[str | None, str]]:
    """(place, text) of all that a file says in words; place None: the text is the whole file, so lines can be told."""
    with open(path, "rb") as file:
        start = file.read(2**16)
    if path.suffix.lower() == ".safetensors":
        header = _safetensors_header(path)
        if header is not None:
            yield "the header", header
            return
    if start.startswith(_PNG):
        yield from (("a text chunk", text) for text in _png_texts(path.read_bytes()))
    whole = _decoded(path, start)
    if whole is not None:
        yield None, whole
        if path.suffix.lower() == ".json" and "\\" in whole:
            yield "a text with escapes", _unescaped(whole)
        return
    if zipfile.is_zipfile(path):
        yield from _members(path)
    yield from (("the bytes", text) for text in _printable(path))


def _decoded(path: Path, start: bytes) -> str | None:
    """The file's text, if it is one in UTF-8, UTF-16 or UTF-32."""
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")
    if encoding == "utf-8" and 0 in start:
        if start.count(0) <= len(start) // 4:
            return None
        # UTF-16 without a mark: every other byte of plain words is zero.
        encoding = "utf-16-le" if start[1:2] == b"\x00" else "utf-16-be"
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError:
        return None
    # Any bytes at all make some text in UTF-16.
    is_text = not encoding.endswith(("le", "be")) or sum(map(str.isascii, text)) > 0.7 * len(text)
    return text if is_text else None


def _safetensors_header(path: Path) -> str | None:
    with open(path, "rb") as file:
        first = file.read(8)
        size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= size <= _MAX_HEADER:
            return None
        raw = file.read(size)
    text = raw.decode("utf-8", "replace")
    return f"{text}\n{_unescaped(text)}"


def _unescaped(text: str) -> str:
    """The strings of a JSON text that hold escapes, as a reader sees them."""
    found = []
    for match in _ESCAPED.finditer(text):
        with contextlib.suppress(ValueError):
            found.append(json.loads(match.group(), strict=False))
    return "\n".join(found)


def _png_texts(content: bytes) -> Iterator[str]:
    position = len(_PNG)
    while position + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[position : position + 8])
        data = content[position + 8 : position + 8 + size]
        if kind in (b"tEXt", b"eXIf"):
            yield data.decode("latin-1").replace("\0", "\n")
        elif kind in (b"zTXt", b"iTXt"):
            keyword, _, rest = data.partition(b"\0")
            if kind == b"zTXt" or rest[:1] == b"\1":
                packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
                unpacker = zlib.decompressobj()
                try:
                    rest = unpacker.decompress(packed, _CHUNK)
                except zlib.error:
                    rest = packed
            yield f"{keyword.decode('latin-1')}\n" + rest.decode("utf-8", "replace").replace("\0", "\n")
        elif kind not in (b"IHDR", b"PLTE", b"IDAT"):
            yield _words(data)
        position += 12 + size


def _members(path: Path) -> Iterator[tuple[str, str]]:
    """The words in the packed files of an archive; what is not packed is found in the bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED and member.file_size <= _MAX_MEMBER:
                    yield f"{member.filename} in the archive", _words(archive.read(member))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error):
        return


def _printable(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        rest = b""
        while chunk := file.read(_CHUNK):
            yield _words(rest + chunk)
            rest = chunk[-_OVERLAP:]


def _words(content: bytes) -> str:
    runs = (run.replace(b"\0", b"").decode("ascii") for run in _RUNS.findall(content))
    # A pickle writes a text's length before it, which can look like a letter.
    return "\n".join(f"{run}\n{run[1:]}" for run in runs)


def _detectors() -> list[Any]:
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ImportError as error:
        raise ImportError(
            'publishing looks for secrets with detect-secrets, which is missing: pip install "hf-sai[hub]"'
        ) from error
    kinds: list[Any] = list(get_mapping_from_secret_type_to_class().values())
    return [kind() for kind in kinds if kind.__name__ in _SHAPES]
