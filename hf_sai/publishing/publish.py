"""Publishes a finished run to the Hugging Face Hub: only files on an allow-list, in one commit, never a secret."""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_sai.publishing.cards import CARD_FILE, card_for_hub
from hf_sai.runs.files import read_text
from hf_sai.runs.record import RECORD_FILE
from hf_sai.runs.redact import known_secrets, redact_text

__all__ = ["ALLOWED", "NEVER", "PublishError", "PublishPlan", "create_repository", "plan_files", "publish"]

logger = logging.getLogger(__name__)

_WEIGHTS_AND_SETTINGS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.fp16.safetensors",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "scheduler_config.json",
)
#: Lists the parts of a diffusers pipeline, each in a folder of that name.
_PIPELINE_INDEX = "model_index.json"
_MAX_INDEX_BYTES = 2**20
#: What is uploaded beside the parts of a diffusers pipeline, as patterns of paths below the run's directory. ``*`` does
#: not reach into folders.
ALLOWED = (
    *_WEIGHTS_AND_SETTINGS,
    _PIPELINE_INDEX,
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    RECORD_FILE,
    "pictures/*.png",
    "images/*.png",
    "samples/*.txt",
    "samples/*.png",
    "sample.txt",
    "all_results.json",
    "eval_results.json",
    "train_results.json",
)
#: What is not uploaded even when it is asked for.
NEVER = (".*", "*.env", "*.pem", "*.key", "id_rsa*", "id_ed25519*", "credentials*", "*.before-hf-sai.md")
#: Files that may be larger than this are weights, which hold no text.
MAX_SCANNED_BYTES = 64 * 2**20
_PARTS_OF_A_MODEL = ("*.safetensors", "*/*.safetensors")


class PublishError(OSError):
    """Publishing failed; the message is one sentence without secrets that says what to do. The run is as it was."""


@dataclass(frozen=True)
class PublishPlan:
    """What publishing a run would upload.

    Attributes:
        files: (path below the run's directory, bytes), sorted.
        left_out: (path, reason) of every other file or folder, sorted.
    """

    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def plan_files(run_dir: str | Path, *, include: Iterable[str] = (), secrets: Iterable[str] = ()) -> PublishPlan:
    """Decide which files of a run's directory to upload.

    Args:
        run_dir: The directory.
        include: Patterns of further files, such as ``optimizer.pt`` or ``checkpoint-100/*``.
        secrets: Strings that no file may hold, beside those of this process.

    Returns:
        The files, and what is left out and why.

    Raises:
        ValueError: There is no such directory, nothing to upload in it, or a file that holds a secret.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory: give the directory of a finished run")
    allowed = (*ALLOWED, *_parts_of_pipeline(root), *include)
    files, left_out = [], []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        reason = _reason_against(path, name, allowed)
        if reason is None:
            files.append((name, path.stat().st_size))
        else:
            left_out.append((name, reason))
    if not any(fnmatch.fnmatch(name, pattern) for name, _ in files for pattern in _PARTS_OF_A_MODEL):
        raise ValueError(f"{root} holds no weights (*.safetensors) to publish: is it the directory of a finished run?")
    hidden = known_secrets(secrets)
    for name, size in files:
        if size <= MAX_SCANNED_BYTES and not name.endswith(".safetensors"):
            _refuse_secrets(root / name, hidden)
    return PublishPlan(tuple(files), tuple(left_out))


def publish(
    run_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    include: Iterable[str] = (),
    update: bool = False,
    message: str = "Publish a run of hf-sai",
    path_in_repo: str = "",
) -> str:
    """Upload a run in one commit: all of it arrives, or nothing changes.

    The card is uploaded with code that loads the model from there; all other files as they are.

    Args:
        run_dir: The run's directory.
        repo_id: ``name`` or ``namespace/name``.
        token: Access token; default: the one of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether a new repository is private; default: the namespace's default.
        revision: Branch; made where missing. Default: main.
        include: Patterns of files beside the allowed ones.
        update: Commit also to a repository that holds something else than a run of hf-sai.
        message: The commit's message.
        path_in_repo: Folder in the repository to put the files in.

    Returns:
        The commit's URL.

    Raises:
        ValueError: Nothing to upload, a secret in a file, or an impossible name.
        PublishError: The Hub refused, the repository holds something else, or the connection broke.
    """
    plan = plan_files(run_dir, include=include, secrets=[token] if token else ())
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    api, repo_id = create_repository(repo_id, token=token, private=private, revision=revision, update=update)
    card = card_for_hub(run_dir, repo_id, revision).encode() if CARD_FILE in dict(plan.files) else b""
    operations = [
        CommitOperationAdd(f"{prefix}{name}", card if name == CARD_FILE else str(Path(run_dir, name)))
        for name, _ in plan.files
    ]
    commit = _call(
        lambda: api.create_commit(repo_id, operations, commit_message=message, revision=revision), repo_id, token
    )
    logger.info("Published %d files (%d bytes) as %s", len(plan.files), plan.total_bytes, commit.commit_url)
    return str(commit.commit_url)


def create_repository(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    update: bool = False,
) -> tuple[HfApi, str]:
    """Make sure that the repository and the branch are there and may be written; do it before a long training.

    Args:
        repo_id: ``name`` or ``namespace/name``.
        token: Access token; default: the stored one.
        private: Whether a new repository is private.
        revision: Branch to make where missing.
        update: Accept a repository that holds something else than a run of hf-sai.

    Returns:
        A client, and the repository's full name.

    Raises:
        ValueError: An impossible name.
        PublishError: No token, the Hub refuses, or the repository holds something else.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository: {redact_text(str(error))}") from None
    if not (token or get_token()):
        raise PublishError("there is no access token: run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi(token=token, library_name="hf-sai")
    full_name = _call(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id, repo_id, token)
    if not update:
        files = _call(lambda: api.list_repo_files(full_name), full_name, token)
        if RECORD_FILE not in files and any(name not in (".gitattributes", "README.md") for name in files):
            raise PublishError(
                f"{full_name} exists and holds no run of hf-sai; choose another name, or update it all the same "
                "(--update, update=True)"
            )
    if revision is not None:
        _call(lambda: api.create_branch(full_name, branch=revision, exist_ok=True), full_name, token)
    return api, full_name


def _parts_of_pipeline(root: Path) -> list[str]:
    """Patterns for the folders that a diffusers pipeline says it consists of."""
    path = root / _PIPELINE_INDEX
    if path.is_symlink() or not path.is_file():
        return []
    try:
        index = json.loads(read_text(path, _MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not the index of a diffusers pipeline: {error}") from None
    folders = [key for key, value in index.items() if isinstance(value, list)] if isinstance(index, dict) else []
    return [f"{name}/{file}" for name in folders if re.fullmatch(r"\w+", name) for file in _WEIGHTS_AND_SETTINGS]


def _reason_against(path: Path, name: str, allowed: tuple[str, ...]) -> str | None:
    parts = name.split("/")
    if any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in NEVER):
        return "never uploaded"
    if path.is_symlink() or not path.is_file():
        return "not a plain file"
    if any(_matches(name, pattern) for pattern in allowed):
        return None
    return "not on the list; --include it if it is to be public"


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _refuse_secrets(path: Path, secrets: Iterable[str]) -> None:
    content = path.read_bytes()
    found = any(secret.encode() in content for secret in secrets)
    if found or (path.suffix in (".md", ".json", ".txt") and _has_token_shape(content)):
        raise ValueError(f"{path} holds an access token; take it out before it is public (and revoke it)")


def _has_token_shape(content: bytes) -> bool:
    text = content.decode("utf-8", errors="ignore")
    return any(redact_text(line) != line for line in text.splitlines() if "hf_" in line)


def _call(action: Any, repo_id: str, token: str | None) -> Any:
    """Run a request; whatever goes wrong becomes one sentence without secrets."""
    try:
        return action()
    except Exception as error:  # huggingface_hub raises its own, its HTTP library's, OSError, ValueError, RuntimeError
        sentence = _explain(error, repo_id)
        # Neither the message nor a chained exception may show a header of the request.
        raise PublishError(redact_text(sentence, [token] if token else ())) from None


def _explain(error: BaseException, repo_id: str) -> str:
    """What happened, and what to do."""
    kept = "the run on disk is as it was; publish again"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        said = " ".join(str(getattr(error, "server_message", None) or "").split())
        if status == 401:
            return f"the Hub does not know the access token (401) for {repo_id}; run `hf auth login`, {kept}"
        if status == 403:
            return f"the access token may not write to {repo_id} (403: {said}); use one with the role write, {kept}"
        if status is not None and status >= 500:
            return f"the Hub failed ({status}) while publishing {repo_id}; nothing was committed, {kept} later"
        return f"the Hub refused to publish {repo_id} ({status}: {said or ' '.join(str(error).split())[:300]}); {kept}"
    told = " ".join(str(error).split())[:300] or "no further word"
    return (
        f"publishing {repo_id} to {constants.ENDPOINT} broke off ({type(error).__name__}: {told}); nothing was "
        f"committed, {kept} when the connection is back"
    )
