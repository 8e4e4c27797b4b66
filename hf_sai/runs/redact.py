"""Keeps access tokens and passwords out of records, cards, logs and error messages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = [
    "REDACTED",
    "is_secret_name",
    "known_secrets",
    "named_entries",
    "named_values",
    "redact",
    "redact_text",
    "redact_words",
    "shaped_secrets",
]

REDACTED = "<redacted>"

#: Names of settings, flags and variables whose value is a secret, whatever it looks like: people choose words, too.
_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:secret|\w*password|passwd|passphrase|pwd|passcode"
    r"|(?:api|access|secret|private|encryption|signing|auth|openai|anthropic|wandb|comet|neptune)[_-]?keys?(?:[_-]id)?"
    r"|(?:db|database|user|admin|root|login|key|ssh|smtp|ftp|sql|mysql|redis|http|proxy|pg)[_-]?pass)$|^pass$",
    re.IGNORECASE,
)
#: The same of variables of the environment.
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:SECRET|PASSWD|PASS|PWD|PASSPHRASE)$|PASSWORD$|^PG\w*PASS$")
#: Names whose value is a secret unless it reads like words, of which no service makes a key.
_DOUBTFUL_NAME = re.compile(
    r"(?:^|[_.-])(?:secrets|passwords|credentials?|creds|authorization|auth|bearer|cookie|pw"
    r"|(?:storage|account|service|master|license|ssh|admin|client|deploy|hub|hf|azure|aws|gcp|google|s3)"
    r"[_-]?keys?(?:[_-]id)?)$",
    re.IGNORECASE,
)
#: The same of variables of the environment, where any key may open something.
_DOUBTFUL_VARIABLE = re.compile(r"(?:^|_)(?:KEY|PAT|AUTH)$|KEY_ID$|SECRET|PASSWORD|PASSPHRASE")
#: PWD is the working directory.
_HARMLESS_VARIABLES = ("PWD", "OLDPWD", "SSH_AUTH_SOCK", "KEY")
_PUBLIC_KEY = re.compile(r"(?:^|_)PUBLIC_KEY$", re.IGNORECASE)
#: A variable that every image of Python sets holds the fingerprint of a public key.
_KEY_OF_GPG = re.compile(r"(?:^|_)GPG_KEY$", re.IGNORECASE)
_FINGERPRINT = re.compile(r"[0-9A-Fa-f ]{8,60}")
#: An ending that does not change what a name names.
_ENDING = re.compile(r"(?:[_-]?\d{1,2}|[_-](?:value|string|read|write|prod|dev))$", re.IGNORECASE)
_LONGEST_NAME = 100
_TOKEN_NAME = re.compile(r"(?:^|[_.-])(?:(?P<kind>[A-Za-z0-9]+)[_-])?token(?P<many>s?)$", re.IGNORECASE)
#: A token that lets somebody in, by the word before "token".
_ACCESS = re.compile(
    r"hub|hf|huggingface|face|auth|access|api|secret|bearer|session|refresh|security|wandb|github|gh|gitlab|slack"
    r"|openai|aws|azure|gcp|google|deploy|jwt|oauth|oauth2|comet|neptune|clearml|kaggle|telegram|discord|npm|pypi|sas"
    r"|csrf"
)
#: A token of a tokenizer, of which a run has to be told.
_SPECIAL = re.compile(
    r"eos|bos|pad|unk|sep|cls|mask|image|img|video|audio|speech|vision|boi|eoi|bov|eov|boa|eoa|start|end"
    r"|begin|stop|special|placeholder|initializer|modifier|trigger|class|instance|concept|system|assistant"
    r"|think|response|instruction|fill|prefix|suffix|middle|decoder|encoder|eot|next|last|first|max|min"
    r"|per|new|target|source|lang|language|forced|eom|sot|newline|cap"
)
_SPECIAL_VALUE = re.compile(r"<[^<>]{0,60}>|\[[^\[\]]{0,60}\]|<\|[^<>]{0,60}\|>|\{[^{}]{0,60}\}")
_NO_SECRETS = ("", "true", "false", "none", "null")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_WORD = re.compile(r"[A-Za-z]{1,15}")
#: As in "learning_rate", "train/data.json", "### USER:" and "~/.ssh/id"; "oauth2"; a date.
_WORDS = re.compile(
    r"[~./_#-]{0,3} ?[A-Za-z]{1,15}(?:[_./ -]{1,3}(?:[A-Za-z]{1,15}|\d{1,3}))*[:.,_]{0,2}"
    r"|[A-Za-z]{4,15}\d|[\d.:/ -]{1,20}"
)
#: Keys under which JSON puts what the key around them names.
_VALUE_KEYS = ("value", "values", "default")

#: Secrets that are known by their shape: Hugging Face, Weights & Biases, GitHub, GitLab, OpenAI and Anthropic, AWS,
#: Google, Slack, npm, PyPI, JSON web tokens, Stripe; Replicate, Groq, LangSmith, Docker, Kaggle, DigitalOcean, RunPod,
#: Linear, Notion, Figma, Sentry, Grafana, Pinecone, Together; xAI, Perplexity, NVIDIA, Tavily, Cerebras; Vault;
#: Databricks; E2B, Supabase, Shopify; Fireworks; SendGrid, Telegram, Azure, Twilio, New Relic, Atlassian, age.
_SECRET_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|hf_(?:oauth|jwt)_[\w-]{20,}(?:\.[\w-]+)*|api_org_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|gl(?:pat|dt|ft|soat|rt|ptt|cbt|agent)-[\w-]{20,}|sk-(?=[\w-]{0,40}?(?=[A-Za-z]{0,15}\d)[A-Za-z0-9]{16})[\w-]{20,}"
    r"|wandb_v1_\w{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|GOCSPX-[\w-]{20,}|ya29\.[\w-]{20,}|1//0[\w-]{40,}"
    r"|xox[abposr]-[\w-]{10,}|xapp-\d-[\w-]{20,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*|(?:[rs]k_live|whsec)_[A-Za-z0-9]{20,}"
    r"|(?:r8|gsk|lsv2_[ps][tk]|dckr_pat|KGAT|do[opr]_v1|rpa|lin_api|ntn|figd|sntry[su]|glsa|pcsk|tgp_v1)_[\w-]{27,}"
    r"|(?:xai|pplx|nvapi)-[\w-]{40,}|tvly-[\w-]{30,}|csk-[a-z0-9]{48}|hv[sb]\.[\w-]{24,}|dapi[0-9a-f]{32}"
    r"|(?:e2b|sbp|shp(?:at|ss|ca|pa))_[0-9a-f]{32,40}|fw_(?=[A-Za-z]{0,20}\d)[A-Za-z0-9]{22,24}"
    r"|SG\.[\w-]{22}\.[\w-]{43}|\d{8,10}:AA[\w-]{33}|[\w~.]{3}\dQ~[\w~.-]{31,34}|SK[0-9a-f]{32}|NRAK-[A-Z0-9]{27}"
    r"|ATATT3[\w=-]{60,}|AGE-SECRET-KEY-1[0-9A-Z]{58})(?![A-Za-z0-9])"
)
#: Addresses that let in whoever has them: webhooks of Slack and Discord, signed links of Azure, AWS and Google.
_URL_SECRET = re.compile(
    r"(?:hooks\.slack\.com/(?:services|workflows)|discord(?:app)?\.com/api/webhooks)/[\w/-]{20,}"
    r"|(?<=[?&])(?:sig|(?:X-(?:Amz|Goog)-)?Signature|X-Amz-Security-Token)=[\w%+/=-]{16,}"
)
_URL_LOGIN = re.compile(
    r"(?<=://)(?:[^/\s:@\"'<>]*:[^/\s@\"'<>]+|(?=[^/\s@\"'<>]*\d)[^/\s:@\"'<>]{16,})(?=@)"  # name:password, or a token
)
#: A header as a whole, also without a scheme, "Bearer" before what can be no word, a line of .netrc, wandb's login.
_HEADER = re.compile(
    r"(?P<head>Authorization\\?[\"']?\s*[:=]\s*\\?[\"']?(?:(?:Bearer|Basic|Token)\s+|(?=\S{8})(?=\S*\d))"
    r"|\bBearer\s+(?=\S*\d|(?-i:[a-z]*[A-Z])\S{15})|\bmachine\s+\S+\s+login\s+\S+\s+password\s+"
    r"|\bwandb\s+login\s+(?=[0-9a-f]{40}\b))(?P<secret>(?!<redacted>)[^\s\"',;]+)",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*-----|\Z)", re.DOTALL
)
#: ``--flag value``, ``--flag=value``, ``trainer.flag=value``, ``?flag=value``, ``NAME=value``, up to the value.
_OPTION = re.compile(
    r"(?<![\w.-])(?:(?P<name>-{1,2}[A-Za-z][\w.-]*)(?:=|\s+(?:\\\s+)?)|\+{0,2}(?P<key>[A-Za-z_][\w.-]*)=)"
)
#: ``"flag": "value"`` of JSON and Python, also escaped, ``flag = "value"`` of programs, ``some_flag: value``.
_ENTRY = re.compile(
    r"(?<![\w.-])(?:(?P<quote>\\?[\"'])(?P<name>-{0,2}[A-Za-z_][\w.-]*)(?P=quote)"
    r"(?:\]?\s*(?::=|=>|[:=])\s*\[{0,3}"
    r"|,\s*(?:default\s*=\s*)?(?=[\"'](?=[^\"'\s]{0,40}?\d)[^\"'\s]{8}))"  # of os.environ.setdefault, of argparse
    r"|(?P<key>[A-Za-z_][\w.-]*)(?:[ \t]*:[ \t]+[\w.| \[\]]{1,40}?)?[ \t]*(?::=|=>|[:=])[ \t]*"
    r"(?:(?:[fF]ield)?\((?:default=)?)?[rbuRBU]?(?=\\?[\"'][^\s,)])"
    r"|(?P<plain>[A-Za-z]+(?:[_-][A-Za-z0-9]+)+):[ \t]+)"
)
#: ``<flag>value</flag>`` of XML, ``name="flag" value="value"`` of HTML and YAML, ``setenv NAME value`` of shells,
#: notebooks and Docker.
_TAG = re.compile(
    r"<(?P<name>[A-Za-z_][\w.-]*)>(?=[^<>\s]+</)"
    r"|\b(?:name|key)[\"']?\s*[:=]\s*[\"']?(?P<key>[A-Za-z_][\w.-]*)[\"']?,?\s*[\"']?value[\"']?\s*[:=]\s*"
    r"|(?:\bsetenv|\bsetx|\bset -\w+|\bENV|%env)[ ]+(?P<variable>[A-Za-z_]\w*)[ ]+(?=[^\s=])"
)
_FLAG = re.compile(r"--?[A-Za-z][\w.-]*")
_VALUE = re.compile(r"\\\"[^\"\\]*\\\"|\"[^\"]*\"|'[^']*'(?:\"'\"'[^']*')*|[^\s\"'&,;}\])](?:(?!</)[^\s\"'&,;}\]])*")
#: What none of the above can do without; most strings of a record have none of it and are left at once.
_MAYBE = re.compile(
    r"hf_|api_org|gh[pousr]_|github_pat|gl\w+-|sk-|wandb|AKIA|ASIA|AIza|GOCSPX|ya29|1//0|xox|xapp-|npm_|pypi-|eyJ"
    r"|k_live_|r8_|gsk_|lsv2_|dckr_|KGAT_|_v1_|xai-|pplx-|nvapi-|hv[sb]\.|dapi|hooks|sig|://|PRIVATE|whsec|rpa_"
    r"|lin_api|ntn_|figd_|sntry|glsa_|pcsk_|tvly-|e2b_|sbp_|shp\w\w_|fw_|SG\.|:AA|Q~|SK[0-9a-f]{32}|NRAK-|ATATT3"
    r"|token|secret|pass|pwd|key|cred|auth|bearer|basic|cookie|[A-Z]PAT=",
    re.IGNORECASE,
)
#: No service makes shorter ones; "zwx92" is a word that somebody teaches a model.
_SHORTEST_SECRET = 8


def is_secret_name(name: str, value: str | None = None) -> bool:
    """Whether what stands under a name is a secret. ``tokenizer``, ``num_tokens`` and a tokenizer's tokens are none.

    Args:
        name: Of a setting, a flag or a variable.
        value: What stands there, where that is known: it decides for names that may be a secret's or may not.

    Example:
        >>> is_secret_name("hub_token"), is_secret_name("eos_token"), is_secret_name("WANDB_API_KEY")
        (True, False, True)
    """
    name = name.lstrip("-+")
    if len(name) > _LONGEST_NAME or name in _HARMLESS_VARIABLES or _PUBLIC_KEY.search(name):
        return False
    if value is not None and (value.lower() in _NO_SECRETS or (value.isdigit() and len(value) <= 3)):
        return False
    if _KEY_OF_GPG.search(name) and value is not None and _FINGERPRINT.fullmatch(value):
        return False
    is_variable = name.isupper()
    name = _ENDING.sub("", name if is_variable else _CAMEL.sub("_", name))
    if _SECRET_NAME.search(name) or (is_variable and _SECRET_VARIABLE.search(name)):
        return True
    are_words = value is not None and (_SPECIAL_VALUE.fullmatch(value) or _WORDS.fullmatch(value))
    token = _TOKEN_NAME.search(name)
    if token is None:
        is_doubtful = _DOUBTFUL_NAME.search(name) or (is_variable and _DOUBTFUL_VARIABLE.search(name))
        return bool(is_doubtful and not are_words)
    kind = (token["kind"] or "").lower()
    if _ACCESS.fullmatch(kind):
        return value is None or not _SPECIAL_VALUE.fullmatch(value)
    is_short = value is not None and len(value) < _SHORTEST_SECRET
    return not (token["many"] or _SPECIAL.fullmatch(kind) or are_words or is_short)


def known_secrets(more: Iterable[str | None] = ()) -> frozenset[str]:
    """The secrets of this process: its environment's, huggingface_hub's stored token, and the ones given.

    Args:
        more: Further secrets, such as ``args.hub_token``; None and very short strings are left out.

    Returns:
        Strings that must not appear in anything that is written or shown. A variable's value that is a common word
        ("password") is none of them: it is in many texts and tells nothing; nor is the name of a file.
    """
    found = {value for name, value in os.environ.items() if _is_telling(name, value)}
    found.update(value for value in more if value)
    hub = sys.modules.get("huggingface_hub")
    stored = hub.get_token() if hub is not None else None
    if stored:
        found.add(stored)
    return frozenset(value for value in found if len(value) >= _SHORTEST_SECRET)


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Replace every secret in a text: the ones given, the process's own, and all that a shape or a name gives away.

    Args:
        text: Anything that is to be written or shown.
        secrets: Secrets beside those of ``known_secrets()``.

    Returns:
        The text with ``<redacted>`` in their place.

    Example:
        >>> redact_text("train.py --hub_token abc123 --eos_token <|end|> with hf_abcdefghijklmnopqrst")
        'train.py --hub_token <redacted> --eos_token <|end|> with <redacted>'
    """
    return _clean(text, known_secrets(secrets))


def redact_words(words: Sequence[str]) -> list[str]:
    """The words of a command without what follows ``--hub_token`` and the like; blanks in a secret cannot hide it.

    Example:
        >>> redact_words(["train.py", "--password", "a b", "--lr", "1"])
        ['train.py', '--password', '<redacted>', '--lr', '1']
    """
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, equals, value = word.partition("=")
        if _FLAG.fullmatch(before) and is_secret_name(before, word) and not word.startswith("--"):
            shown.append(REDACTED)
        elif equals and value and re.fullmatch(r"[+-]*[A-Za-z_][\w.-]*", name) and is_secret_name(name, value):
            shown.append(f"{name}={REDACTED}")
        else:
            shown.append(word)
    return shown


def shaped_secrets(text: str) -> Iterator[tuple[int, str]]:
    """(position, secret) of what its shape gives away in a text, whatever stands around it."""
    for pattern in (_SECRET_SHAPES, _URL_LOGIN, _URL_SECRET, _PRIVATE_KEY):
        yield from ((match.start(), match.group()) for match in pattern.finditer(text) if REDACTED not in match.group())


def named_values(text: str) -> Iterator[tuple[int, str, str]]:
    """(position, name, value) of what stands in a text under the name of a secret, and of headers that carry one.

    A value has the quotes around it that it has in the text.
    """
    for pattern in (_OPTION, _ENTRY, _TAG):
        yield from ((head.start(), name, value.group()) for head, name, value in _secret_values(pattern, text))
    for match in _HEADER.finditer(text):
        yield match.start(), match["head"].strip(" \t\r\n:=\\\"'"), f'"{match["secret"]}"'


def named_entries(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, value) of every string and number of a JSON-like value; a word after a flag stands under the flag.

    Example:
        >>> list(named_entries({"auth": {"value": "x"}, "argv": ["--pwd", "y"]}))
        [('auth', 'x'), ('argv', '--pwd'), ('--pwd', 'y')]
    """
    if isinstance(content, dict):
        for inner, value in content.items():
            yield from named_entries(value, _key_of(content, str(inner), key))
    elif isinstance(content, list):
        for before, value in zip([None, *content], content, strict=False):
            is_flag = isinstance(before, str) and _FLAG.fullmatch(before)
            yield from named_entries(value, before if is_flag and isinstance(value, str) else key)
    elif isinstance(content, str) or _is_password_of_digits(key, content):
        yield key, str(content)


def redact(value: Any, secrets: Iterable[str] = ()) -> Any:
    """Redact every string of a JSON-like value, and whatever stands under a key such as ``hub_token``.

    Args:
        value: Dicts, lists, strings, numbers.
        secrets: As for ``redact_text``.

    Returns:
        A copy without secrets.

    Example:
        >>> redact({"hub_token": "x", "tokens": 3, "note": ["hf_abcdefghijklmnopqrst"]})
        {'hub_token': '<redacted>', 'tokens': 3, 'note': ['<redacted>']}
    """
    return _redact(value, known_secrets(secrets))


def _redact(value: Any, secrets: frozenset[str], key: str = "") -> Any:
    if isinstance(value, str):
        return REDACTED if value and is_secret_name(key, value) else _clean(value, secrets)
    if isinstance(value, dict):
        return {
            _clean(str(inner), secrets): _redact(item, secrets, _key_of(value, str(inner), key))
            for inner, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets, key) for item in _items(value)]
    return REDACTED if _is_password_of_digits(key, value) else value


def _key_of(content: dict[Any, Any], key: str, around: str) -> str:
    """What names a value: its key, or where that is only ``value`` the name beside it or the key around it."""
    return str(content.get("name") or around) if key in _VALUE_KEYS else key


def _is_password_of_digits(key: str, value: Any) -> bool:
    """YAML reads a password of digits as a number; "pass" before a small one counts passes."""
    return isinstance(value, int | float) and abs(value) >= 1000 and _SECRET_NAME.search(key) is not None


def _items(value: Sequence[Any]) -> Sequence[Any]:
    """A list of texts may be a command's words, where a flag's value follows it; ``a=b c`` is left to ``_clean``."""
    if not all(isinstance(item, str) for item in value):
        return value
    shown = zip(value, redact_words(value), strict=True)
    return [item if " " in item and clean != REDACTED else clean for item, clean in shown]


def _is_telling(name: str, value: str) -> bool:
    is_secret = name not in _HARMLESS_VARIABLES and (is_secret_name(name, value) or is_secret_name(name.upper(), value))
    return is_secret and not _WORD.fullmatch(value) and not os.path.exists(value)


def _clean(text: str, secrets: frozenset[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    if not _MAYBE.search(text):
        return text
    for shape in (_PRIVATE_KEY, _URL_LOGIN, _SECRET_SHAPES, _URL_SECRET):
        text = shape.sub(REDACTED, text)
    for pattern in (_OPTION, _ENTRY, _TAG):
        text = _without_values(pattern, text)
    return _HEADER.sub(rf"\g<head>{REDACTED}", text)


def _secret_values(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str, re.Match[str]]]:
    """(what stands before it, name, value); what stands under another name may hold one in its turn."""
    position = 0
    while head := pattern.search(text, position):
        position = head.end()
        name = next(group for key, group in head.groupdict().items() if group and key != "quote")
        if is_secret_name(name) and (value := _VALUE.match(text, position)) and _is_secret(name, value.group()):
            yield head, name, value
            position = value.end()


def _is_secret(name: str, value: str) -> bool:
    bare = value.strip("\\\"'").rstrip("`)")
    if bare.startswith(REDACTED) or not is_secret_name(name, bare):
        return False
    return not (bare == value and bare.isdigit() and _TOKEN_NAME.search(name))  # the number of a token


def _without_values(pattern: re.Pattern[str], text: str) -> str:
    parts, end = [], 0
    for _, _, value in _secret_values(pattern, text):
        shown = value.group()
        marks = shown[: len(shown) - len(shown.lstrip("\\\"'"))] if shown[0] in "\\\"'" else ""
        parts += [text[end : value.start()], f"{marks}{REDACTED}{marks}"]
        end = value.end()
    return "".join([*parts, text[end:]])
