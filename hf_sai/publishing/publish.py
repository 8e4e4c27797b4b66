"""Publishes a finished run to the Hugging Face Hub: in one commit, privately, without paths of this machine."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_sai.publishing.card_merge import words_of_a_person
from hf_sai.publishing.cards import CARD_FILE, base_model, card_for_hub
from hf_sai.publishing.files_to_publish import plan_files, worth_telling
from hf_sai.runs.files import read_text
from hf_sai.runs.paths import hide_paths, is_local_path
from hf_sai.runs.record import MAX_RECORD_BYTES, RECORD_FILE, RunRecord
from hf_sai.runs.redact import redact_text

__all__ = ["PublishError", "create_repository", "publish", "require_possible_name", "visibility"]

logger = logging.getLogger(__name__)

#: Keys of configurations under which libraries note where something was loaded from.
_PLACES = ("base_model_name_or_path", "_name_or_path", "name_or_path", "tokenizer_file", "best_model_checkpoint")
#: The largest file that is kept in memory until it is uploaded (bytes).
_MAX_IN_MEMORY = 10 * 2**20
#: Texts that are the model's, and no settings.
_TEXTS = ("chat_template", "text", "prompt", "content")
_WORD_LISTS = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")


class PublishError(OSError):
    """Publishing failed; the message is one sentence without secrets that says what to do. The run is as it was."""


def publish(
    run_dir: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = True,
    revision: str | None = None,
    include: Iterable[str] = (),
    update: bool = False,
    message: str = "Publish a run of hf-sai",
    path_in_repo: str = "",
) -> str:
    """Upload a run in one commit: all of it arrives, or nothing changes.

    The card is uploaded with code that loads the model from there, configurations and the record without paths of this
    machine (a base model that only lies here becomes null); all other files as they are.

    Args:
        run_dir: The run's directory.
        repo_id: ``name`` or ``namespace/name``.
        token: Access token; default: the one of ``hf auth login`` or ``HF_TOKEN``.
        private: Whether a new repository is private; one that is there stays as it is.
        revision: Branch; made where missing. Default: main.
        include: Patterns of files beside the allowed ones.
        update: Commit also to a repository that holds something else than a run of hf-sai, or a card with words of a
            person that this run's card has not.
        message: The commit's message.
        path_in_repo: Folder in the repository to put the files in.

    Returns:
        The commit's URL.

    Raises:
        ValueError: Nothing to upload, a secret in a file or in the message, a file that changes meanwhile, or an
            impossible name.
        PublishError: The Hub refused, the repository holds something else, or the connection broke.
    """
    if redact_text(message, [token] if token else ()) != message:
        raise ValueError(
            "the commit's message holds what looks like a secret, and everybody would read it; leave it out"
        )
    plan = plan_files(run_dir, include=include, secrets=[token] if token else ())
    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    has_card = CARD_FILE in dict(plan.files)
    card = card_for_hub(run_dir, repo_id, revision) if has_card and not prefix else None
    options: dict[str, Any] = {"private": private, "revision": revision, "update": update}
    api, repo_id = create_repository(repo_id, token=token, card=card, **options)
    plan.require_unchanged(run_dir)
    contents: dict[str, bytes | None] = {}
    if has_card:  # once more, with the repository's full name
        contents[CARD_FILE] = card_for_hub(run_dir, repo_id, revision).encode()
    record = RunRecord.load(run_dir) if RECORD_FILE in dict(plan.files) else None
    for name, _ in plan.files:
        contents[name] = contents.get(name) or _for_others(Path(run_dir, name), name, record)
    # Small files are read now: what is uploaded later is what was searched for secrets.
    for name, size in plan.files:
        if contents[name] is None and size <= _MAX_IN_MEMORY:
            contents[name] = Path(run_dir, name).read_bytes()
    operations = [
        CommitOperationAdd(f"{prefix}{name}", content if content is not None else str(Path(run_dir, name)))
        for name, content in contents.items()
    ]
    commit = _call(
        lambda: api.create_commit(repo_id, operations, commit_message=message, revision=revision), repo_id, token
    )
    if told := worth_telling(plan):
        logger.warning("%s: %s.", run_dir, told)
    logger.info("Published %d files (%d bytes) as %s", len(plan.files), plan.total_bytes, commit.commit_url)
    return str(commit.commit_url)


def create_repository(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool = True,
    revision: str | None = None,
    update: bool = False,
    card: str | None = "",
) -> tuple[HfApi, str]:
    """Make sure that the repository and the branch are there and may be written; do it before a long training.

    Args:
        repo_id: ``name`` or ``namespace/name``.
        token: Access token; default: the stored one.
        private: Whether a new repository is private.
        revision: Branch to make where missing.
        update: Accept a repository that holds something else than a run of hf-sai, or a person's card.
        card: The card that is about to be uploaded; empty where it is not known yet, None where there will be none.

    Returns:
        A client, and the repository's full name.

    Raises:
        ValueError: An impossible name.
        PublishError: No token, the Hub refuses, or the repository is public or holds something else.
    """
    require_possible_name(repo_id)
    if not (token or get_token()):
        raise PublishError("there is no access token: run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi(token=token, library_name="hf-sai")
    full_name = _call(lambda: api.create_repo(repo_id, private=private, exist_ok=True).repo_id, repo_id, token)
    if private and not _call(lambda: api.model_info(full_name).private, full_name, token):
        raise PublishError(
            f"{full_name} is public: say so if this run is to be (--public, private=False, --hub_private_repo false), "
            "or choose another name"
        )
    if not update:
        branch, files = _call(lambda: _branch_and_files(api, full_name, revision), full_name, token)
        if RECORD_FILE not in files and any(name not in (".gitattributes", CARD_FILE) for name in files):
            raise PublishError(
                f"{full_name} exists and holds no run of hf-sai; choose another name, or update it all the same "
                "(--update, update=True)"
            )
        if card is not None and CARD_FILE in files and _holds_words(api, full_name, branch, card, token):
            raise PublishError(
                f"the card of {full_name} holds words of a person that this run's card has not; put them into the "
                f"run's {CARD_FILE}, or replace the card (--update, update=True)"
            )
    if revision is not None:
        _call(lambda: api.create_branch(full_name, branch=revision, exist_ok=True), full_name, token)
    return api, full_name


def require_possible_name(repo_id: str) -> None:
    """Refuse, without a request, what no repository on the Hub can be called.

    Args:
        repo_id: ``name`` or ``namespace/name``.

    Raises:
        ValueError: An impossible name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the name of a repository: {redact_text(str(error))}") from None


def visibility(repo_id: str, token: str | None = None) -> str:
    """Whether a repository on the Hub is ``private`` or ``public``."""
    api = HfApi(token=token, library_name="hf-sai")
    is_private = _call(lambda: api.model_info(api.create_repo(repo_id, exist_ok=True).repo_id).private, repo_id, token)
    return "private" if is_private else "public"


def _branch_and_files(api: HfApi, name: str, revision: str | None) -> tuple[str | None, list[str]]:
    """The branch that will be committed to, or the one it will be made from (None: main), and what it holds."""
    if revision is not None:
        try:
            return revision, api.list_repo_files(name, revision=revision)
        except RevisionNotFoundError:
            pass
    return None, api.list_repo_files(name)


def _holds_words(api: HfApi, name: str, revision: str | None, card: str, token: str | None) -> bool:
    """Whether the card on the Hub has words of a person that the new one has not."""
    with tempfile.TemporaryDirectory() as folder:
        path = _call(
            lambda: api.hf_hub_download(name, CARD_FILE, revision=revision, local_dir=folder, force_download=True),
            name,
            token,
        )
        try:
            return bool(words_of_a_person(path, card))
        except ValueError:  # what cannot be read is nobody's to throw away
            return True


def _for_others(path: Path, name: str, record: RunRecord | None) -> bytes | None:
    """A configuration or record without paths of this machine; None where it is fit to be seen as it is."""
    if not name.endswith(".json") or path.stat().st_size > MAX_RECORD_BYTES:
        return None
    try:
        if name == RECORD_FILE:
            return None if record is None else record.to_text().encode()
        content = json.loads(read_text(path, MAX_RECORD_BYTES))
    except (ValueError, RecursionError):
        return None
    base = base_model(record) if record is not None else None
    shown = _without_places(content, base, word_list=name.rpartition("/")[2] in _WORD_LISTS)
    return None if shown == content else (json.dumps(shown, indent=2, ensure_ascii=False) + "\n").encode()


def _without_places(value: Any, base: str | None, *, word_list: bool = False, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _without_places(v, base, word_list=word_list, key=str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_places(v, base, word_list=word_list, key=key) for v in value]
    if not isinstance(value, str) or word_list:
        return value
    if key in _PLACES and is_local_path(value) and value:
        return base if key in ("base_model_name_or_path", "_name_or_path") else None
    return value if key in _TEXTS else hide_paths(value)


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
