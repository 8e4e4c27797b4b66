"""Looks for secrets in files that are about to be public: text of any encoding, and what binaries say of themselves.

Shapes are those of detect-secrets (``pip install "hf-sai[hub]"``), names and further shapes those of
:mod:`hf_sai.runs.redact`. Nothing is sent anywhere to try a secret out.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hf_sai.runs.redact import REDACTED, is_secret_name, named_entries, named_values, shaped_secrets

__all__ = ["find_secret"]

#: Detectors of detect-secrets that tell by the shape alone. Those left out take hashes, words of vocabularies or
#: addresses for secrets, or the square of the time on long lines (OpenAI's and npm's, which ``redact`` knows).
_SHAPES = (
    *("AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector", "CloudantDetector", "DiscordBotTokenDetector"),
    *("GitHubTokenDetector", "GitLabTokenDetector", "IbmCloudIamDetector", "IbmCosHmacDetector", "JwtTokenDetector"),
    *("MailchimpDetector", "PrivateKeyDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector"),
    *("SoftlayerDetector", "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector"),
)
#: The detectors' time grows with the third power of such a run.
_BLANKS = re.compile(r" {5,}")
_ENCRYPTED_KEY = re.compile(r"BEGIN (?:ENCRYPTED |[A-Z0-9]+ )?PRIVATE KEY")
#: Word lists, in which names and values are words of a language.
_VOCABULARIES = re.compile(
    r"(?:.*/)?(?:(?:tokenizer|encoder|vocab[\w-]*|\w*_vocab|added_tokens|byte_maps|word_\w+)\.(?:json|txt)|merges\.txt"
    r"|.*\.(?:spm|model|tiktoken|codes|bpe))",
    re.ASCII,
)
#: What a model wrote, which may be a program with a made-up password.
_WRITTEN_BY_MODELS = re.compile(r"(?:samples/.*|sample)\.txt")
#: Keys of JSON under which stands what a model wrote, was asked or was taught, and no setting.
_SAID = (
    *("text", "prompt", "prompts", "messages", "conversations", "chat_template", "completion", "instruction", "input"),
    *("output", "question", "answer", "response", "chosen", "rejected"),
)
#: Programs, in which only what stands in quotes is a value.
_CODE = (
    *(".py", ".pyi", ".jinja", ".j2", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".java", ".kt", ".scala", ".go", ".rs"),
    *(".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".cs", ".swift", ".rb", ".php", ".lua", ".jl"),
)
#: On a line that holds no secret, though it looks so.
_ALLOWED = "pragma: allowlist secret"
#: What stands for a value in a program: a call, an attribute, a variable.
_REFERENCE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*[\[(].*|[A-Za-z_]+(?:\.[A-Za-z_]\w*)+|[a-z]+(?:_(?:[a-z]+|\d{1,3}))+")
#: What stands for a value in an explanation.
_PLACEHOLDER = re.compile(
    r"<.*>|\$\{.*|(?-i:\$[A-Z_][A-Z0-9_]*)|\$\d|\{.*\}|%\w+%|%s|%\(\w+\)s|.*(?:your|example|\.\.\.|…|\*\*\*).*"
    r"|(?:\w{1,12}[_-])?x{3,}|empty|todo|placeholder|unused|(?:dummy|fake)([_-].*)?|(?:sk-)?not?[_-].*(?:needed|required)"
    r"|token-abc123|ollama|lm-studio",
    re.IGNORECASE,
)
_MADE_UP = re.compile(r"your|example|(.)\1{5}", re.IGNORECASE)
#: What stands before a value in a header.
_SCHEME = re.compile(r"(?:Bearer|Basic|Token)(?:\s+|$)", re.IGNORECASE)
#: TOKEN, MY_PASSWORD and the like; $token.
_METAVARIABLE = re.compile(r"\$?[A-Za-z]{1,15}(?:[_-]{1,2}[A-Za-z]{1,15})*")
#: The share of a text's bytes that may be no UTF-8: letters of another encoding.
_MOST_BROKEN = 0.2
_MARKS = (
    *((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")),
    *((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")),
)
#: A string of JSON with a backslash in it.
_ESCAPED = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)+"', re.DOTALL)
#: A line of a file of settings, such as ~/.aws/credentials or YAML.
_SETTING = re.compile(
    r"^[ \t]*(?:-[ \t]+)?([A-Za-z_][\w.-]*)[ \t]*[:=][ \t]*([^\s()\[\]{}\"',]{6,})[ \t]*$", re.MULTILINE
)
_CHUNK, _OVERLAP = 2**24, 2**12
_MAX_HEADER = 100 * 2**20
#: The largest packed file of which more than the words are looked at, and how deep archives in archives are opened.
_MAX_MEMBER, _DEEPEST = 2**28, 4
#: A file that an archive holds as it is, and that is opened beside the search of the archive's bytes.
_SMALL_MEMBER = 2**24
_PACKERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(ValueError, RuntimeError, NotImplementedError),  # ValueError: a damaged name or date
)
_PNG = b"\x89PNG\r\n\x1a\n"
#: Words in one byte a letter, in UTF-16, and in UTF-32, in which numpy keeps them.
_LETTER = r"[\t\x20-\x7e]"
_RUNS = re.compile(
    rf"{_LETTER}{{8,}}|(?:{_LETTER}\0){{8,}}|(?:\0{_LETTER}){{8,}}|(?:{_LETTER}\0{{3}}){{8,}}|(?:\0{{3}}{_LETTER}){{8,}}".encode()
)


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
    with open(path, "rb") as file:
        for place, text, kind in itertools.chain([("its name", name, None)], _texts(file, name)):
            found = _shaped(text, hidden, detectors)
            if found is None and kind is not None:
                found = _named(text, kind)
            if found is not None:
                position, what = found
                return place or f"line {text.count(chr(10), 0, position) + 1}", what
    return None


def _shaped(text: str, secrets: tuple[str, ...], detectors: list[Any]) -> tuple[int, str] | None:
    """Position and kind of the first secret that its shape gives away."""
    own = [(text.find(secret), "an access token of this machine") for secret in secrets if secret in text]
    found = [(start, "an access token") for start, secret in shaped_secrets(text) if not _is_made_up(secret)]
    found += [(match.start(), "a private key") for match in _ENCRYPTED_KEY.finditer(text)]
    shortened = _BLANKS.sub("    ", text)
    for detector in detectors:
        for value in detector.analyze_string(shortened):
            start = text.find(value)
            if start >= 0 and _stands_alone(text, start, value) and not (_is_made_up(value) or _is_harmless(value, "")):
                found.append((start, f"what looks like one ({detector.secret_type})"))
    either = sorted([*own, *found])
    return next((find for find in either if find in own or _ALLOWED not in _line(text, find[0])), None)


def _stands_alone(text: str, start: int, value: str) -> bool:
    """Whether the match is no part of a longer run, such as base64 of a table."""
    around = text[max(0, start - 1) : start], text[start + len(value) : start + len(value) + 1]
    return not (value.isalnum() and any(char.isalnum() or char in "+/" for char in around if char))


def _named(text: str, name: str) -> tuple[int, str] | None:
    """Position and kind of the first value that its name gives away."""
    if _VOCABULARIES.fullmatch(name) or _WRITTEN_BY_MODELS.fullmatch(name):
        return None
    suffix = Path(name).suffix.lower()
    content = _json(text)
    if content is None:
        found = _stated(text, is_code=suffix in _CODE)
        return None if found is None else (found[0], f"a value of {found[1]!r}")
    for key, value in named_entries(content):
        if is_secret_name(key, value) and not _is_harmless(value, key):
            return _position(text, value, key), f"a value of {key!r}"
    for key, value in _strings(content, said=() if suffix == ".ipynb" else _SAID):
        found = _stated(value)
        if found is not None:
            return _position(text, value, key), f"a value of {found[1]!r} (in {key!r})"
    return None


def _stated(text: str, *, is_code: bool = False) -> tuple[int, str] | None:
    """Position and name of the first value that a text gives to the name of a secret."""
    for start, name, value in named_values(text):
        is_quoted = value[0] in "\\\"'"
        bare = value.strip("\\\"'") if is_quoted else value.rstrip("`)")
        is_meant = is_quoted or not (is_code or _is_reference(bare, name) or _is_sentence(text, start, value))
        if is_meant and not _is_harmless(bare, name) and _ALLOWED not in _line(text, start):
            return start, name
    for match in () if is_code else _SETTING.finditer(text):
        name, value = match.groups()
        is_number = value.isdigit() and "token" in name.lower()
        if value.isalpha() or is_number or not is_secret_name(name, value) or _is_reference(value, name):
            continue
        if not _is_harmless(value, name) and _ALLOWED not in _line(text, match.start(1)):
            return match.start(1), name
    return None


def _line(text: str, position: int) -> str:
    end = text.find("\n", position)
    return text[text.rfind("\n", 0, position) + 1 : end if end >= 0 else len(text)]


def _is_made_up(secret: str) -> bool:
    """Whether it only shows where a secret is to stand; a private key may hold any letters."""
    if secret.startswith("-----"):
        return False
    password = secret.rpartition(":")[2] if ":" in secret else ""
    return _MADE_UP.search(secret) is not None or bool(password and _is_harmless(password, "password"))


def _is_harmless(value: str, name: str) -> bool:
    """Whether a value is none: too short, a placeholder, or a word that only says again what is to stand there."""
    value = _SCHEME.sub("", value, count=1) if _SCHEME.match(value) else value
    if len(value) < 3 or REDACTED in value or _PLACEHOLDER.fullmatch(value):
        return True
    bare = value.lstrip("$")
    words, named = (set(re.split("[_.-]+", part.lower())) - {""} for part in (bare, name))
    repeats = words & named if bare.isupper() else words <= named
    return bool(_METAVARIABLE.fullmatch(value) and (repeats or is_secret_name(bare)))


def _is_reference(value: str, name: str) -> bool:
    """Whether what stands without quotes is a command, a call or a variable; a word after a flag is no variable."""
    return value.startswith(("`", "$(")) or (not name.startswith("-") and _REFERENCE.fullmatch(value) is not None)


def _is_sentence(text: str, start: int, value: str) -> bool:
    """Whether words go on after a colon, as in "hub_token: read from the environment"."""
    begin = text.index(value, start)
    end = begin + len(value)
    return value.isalpha() and ":" in text[start:begin] and re.match(r"[ ][A-Za-z(]", text[end : end + 2]) is not None


def _json(text: str) -> Any:
    """What a text in JSON holds, or one with JSON on each line; None for any other."""
    text = text.lstrip("\ufeff \t\r\n")
    if not text.startswith(("{", "[")):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    content: list[Any] = []
    for line in text.splitlines():
        try:
            content.append(json.loads(line))
        except (ValueError, RecursionError):
            content.append(line)
    return None if isinstance(content[0], str) else content


def _position(text: str, value: str, key: str) -> int:
    """Where a value of JSON stands, or its key."""
    number = [value] if value.isdigit() else []
    written = [json.dumps(value, ensure_ascii=False), json.dumps(value), *number, json.dumps(key)]
    return next((position for position in map(text.find, written) if position >= 0), 0)


def _strings(content: Any, said: tuple[str, ...], key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for inner, value in content.items():
            if inner not in said:
                yield from _strings(value, said, str(inner))
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value, said, key)


def _texts(file: IO[bytes], name: str, depth: int = 0) -> Iterator[tuple[str | None, str, str | None]]:
    """(place, text, name) of all that a file says in words.

    Place None: the text is the whole file, so lines can be told. Name None: only shapes are to be looked for.
    """
    start = file.read(2**16)
    if name.lower().endswith(".safetensors"):
        header = _safetensors_header(file)
        if header is not None:
            yield "the header", header, name
            yield "the header", _unescaped(header), None
            return
    if start.startswith(_PNG):
        file.seek(0)
        yield from (("a text chunk", text, "") for text in _png_texts(file.read()))
    whole = _decoded(file, start)
    if whole is not None:
        yield None, whole, name
        if "\\" in whole and _json(whole) is not None:
            yield "a text with escapes", _unescaped(whole), None
        return
    if depth < _DEEPEST:
        with contextlib.suppress(*_UNREADABLE):
            yield from _packed(file, start, name, depth)
    if start.startswith(b"\x80"):
        file.seek(0)
        yield "a pickled text", _pickled(file), None
    file.seek(0)
    yield from (("the bytes", text, name) for text in _printable(file))


def _pickled(file: IO[bytes]) -> str:
    """The texts of pickles, one behind the other; nothing in them is executed."""
    found: list[str] = []
    with contextlib.suppress(ValueError, LookupError, OverflowError):  # the end, or no pickle
        while True:
            texts = (value for _, value, _ in pickletools.genops(file) if isinstance(value, str))
            found += (text for text in texts if len(text) < _CHUNK)  # old pickles keep arrays as text
    return "\n".join(found)


def _packed(file: IO[bytes], start: bytes, name: str, depth: int) -> Iterator[tuple[str, str, str | None]]:
    """(place, text, name) of what is packed in a file; what is not packed is found in its bytes, too."""
    for mark, unpack in _PACKERS:
        if start.startswith(mark):
            file.seek(0)
            with unpack(file) as inner:
                yield from _member(inner, Path(name).stem, "what is packed in it", depth)
            return
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            yield "the archive's names", "\n".join(archive.namelist()), None
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED or member.file_size <= _SMALL_MEMBER:
                    with contextlib.suppress(*_UNREADABLE), archive.open(member) as inner:
                        yield from _member(inner, member.filename, f"{member.filename} in the archive", depth)


def _member(file: Any, name: str, place: str, depth: int) -> Iterator[tuple[str, str, str | None]]:
    content = file.read(_MAX_MEMBER + 1)
    if len(content) <= _MAX_MEMBER:
        yield from ((place, text, kind) for _, text, kind in _texts(io.BytesIO(content), name, depth + 1))
    else:
        file.seek(0)
        yield from ((place, text, name) for text in _printable(file))


def _decoded(file: IO[bytes], start: bytes) -> str | None:
    """The file's text, if it is one in UTF-8, but for some letters, or in UTF-16 or UTF-32 with a mark."""
    encoding = next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")
    is_utf8 = encoding == "utf-8"
    if is_utf8 and (0 in start or start.decode("utf-8", "replace").count("\ufffd") > _MOST_BROKEN * len(start)):
        return None
    file.seek(0)
    try:
        return file.read().decode(encoding, "replace" if is_utf8 else "strict")
    except UnicodeDecodeError:
        return None


def _safetensors_header(file: IO[bytes]) -> str | None:
    file.seek(0)
    first = file.read(8)
    size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
    return file.read(size).decode("utf-8", "replace") if 2 <= size <= _MAX_HEADER else None


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
        keyword, _, rest = data.partition(b"\0")
        if kind in (b"zTXt", b"iTXt"):
            is_packed = kind == b"zTXt" or rest[:1] == b"\1"
            rest = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
            if is_packed:
                with contextlib.suppress(zlib.error):
                    rest = zlib.decompressobj().decompress(rest, _CHUNK)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            text = rest.decode("utf-8", "replace")
            yield text
            yield f"{keyword.decode('latin-1')}: {text}"
        elif kind not in (b"IHDR", b"PLTE", b"IDAT"):
            yield _words(data)
        position += 12 + size


def _printable(file: IO[bytes]) -> Iterator[str]:
    rest = b""
    while chunk := file.read(_CHUNK):
        yield _words(rest + chunk)
        rest = chunk[-_OVERLAP:]


def _words(content: bytes) -> str:
    runs = (run.replace(b"\0", b"").decode("ascii") for run in _RUNS.findall(content))
    # Protobuf writes a text's kind and its length before it, which can look like letters. No value begins with the sign
    # between.
    return "\n;\n".join(f"{run}\n;\n{run[1:]}\n;\n{run[2:]}" for run in runs)


def _detectors() -> list[Any]:
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ImportError as error:
        raise ImportError(
            'publishing looks for secrets with detect-secrets, which is missing: pip install "hf-sai[hub]"'
        ) from error
    kinds: list[Any] = list(get_mapping_from_secret_type_to_class().values())
    return [kind() for kind in kinds if kind.__name__ in _SHAPES]
