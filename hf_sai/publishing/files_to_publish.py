"""Decides which files of a run go to the Hub: what loading needs and what explains the run, never a secret."""

from __future__ import annotations

import ast
import fnmatch
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_sai.publishing.secret_scan import find_secret
from hf_sai.runs.files import read_text
from hf_sai.runs.record import RECORD_FILE
from hf_sai.runs.redact import known_secrets, redact_text

__all__ = ["ALLOWED", "NEVER", "PublishPlan", "adapter_folder", "is_tokenizer", "plan_files", "worth_telling"]

logger = logging.getLogger(__name__)

_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "dict.txt", "bpe.codes", "byte_maps.json", "emoji.json"),
    *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "entity_vocab.json", "word_shape.json"),
    *("word_pronunciation.json", "normalizer.json", "audio_tokenizer_config.json"),
    *("*.spm", "*.tiktoken", "tokenizer.model", "spiece.model", "spm.model", "spm_char.model", "tiktoken.model"),
    *("sentencepiece.model", "sentencepiece.bpe.model", "prophetnet.tokenizer", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
)
#: What a model, or one part of a pipeline, is loaded from.
_MODEL = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extractor_config.json", "scheduler_config.json"),
    *("quantize_config.json", "quantization_config.json", "params.json", "open_clip_config.json"),
    *_TOKENIZER,
)
#: What goes along of the folder of a part that an index names: every library has settings and code of its own there.
_PART = (*_MODEL, "*.json", "*.py")
#: Code of a model's own, by the names that transformers' documentation gives it.
_CODE = (
    *("configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py", "image_processing_*.py"),
    *("video_processing_*.py", "feature_extraction_*.py", "generation_*.py", "pipeline.py"),
    "custom_generate/generate.py",
)
#: Lists the parts of a diffusers pipeline, each in a folder of that name.
_PIPELINE_INDEX = "model_index.json"
#: Lists the modules of sentence-transformers, each in a folder of its own.
_MODULES = "modules.json"
#: Says which of them a text goes through.
_ROUTER = "router_config.json"
_MAX_INDEX_BYTES = 2**20
_MOST_NAMES = 20
#: What is uploaded beside the parts that a model names itself, as patterns of paths below the run's directory. ``*``
#: does not reach into folders.
ALLOWED = (
    *_MODEL,
    *_CODE,
    "custom_generate/requirements.txt",
    "additional_chat_templates/*.jinja",
    # What a processor saves beside its first tokenizer: InstructBLIP's others, Bark's voices.
    *(f"*_tokenizer/{name}" for name in _TOKENIZER),
    *("speaker_embeddings_path.json", "speaker_embeddings/*.npy", "speaker_embeddings/*/*.npy"),
    _PIPELINE_INDEX,
    *(_MODULES, _ROUTER, "config_sentence_transformers.json", "sentence_*_config.json", "idf.json"),
    *("README.md", "LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY.md"),
    RECORD_FILE,
    *("pictures/*.png", "images/*.png", "samples/*.txt", "samples/*.png", "sample.txt"),
    *("all_results.json", "eval_results.json", "train_results.json"),
)
#: What is not uploaded even when it is asked for, in any case of letters; ``training_args.bin`` pickles ``hub_token``.
NEVER = (
    *(".*", "_netrc", "*.env", "*.pem", "*.key", "*.pfx", "*.p12", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.token"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credential*", "secret*", "*secrets.*", "*credentials.*"),
    *("client_secret*", "service_account*.json", "kaggle.json", "password*", "token", "*token.txt", "tokens.txt"),
    *("*api_key*", "*api-key*", "*apikey*"),
    *("training_args.bin", "*.before-hf-sai.md", "*.part"),
)
#: What a training keeps to go on with, and logs of it: nobody misses it in an upload.
_OF_TRAINING = re.compile(
    r"(?:.*/)?(?:optimizer\.(?:pt|bin)|scheduler\.(?:pt|bin)|scaler\.pt|rng_state\w*\.pth|random_states_\d+\.pkl"
    r"|trainer_state\.json|training_args\.bin|\..*)|(?:checkpoint-\d+|runs|wandb|\.[^/]*)/.*|.*\.before-hf-sai\.md"
)


@dataclass(frozen=True)
class PublishPlan:
    """What publishing a run would upload.

    Attributes:
        files: (path below the run's directory, bytes), sorted.
        left_out: (path, reason) of every other file or folder, sorted.
        written: When each of the files was last written, before it was searched for secrets.
    """

    files: tuple[tuple[str, int], ...]
    left_out: tuple[tuple[str, str], ...]
    written: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)

    def require_unchanged(self, run_dir: str | Path) -> None:
        """Raise ValueError where a file is no longer the one that was searched for secrets."""
        for (name, size), written in zip(self.files, self.written, strict=True):
            path = Path(run_dir, name)
            if not path.exists() or (path.stat().st_size, path.stat().st_mtime_ns) != (size, written):
                raise ValueError(f"{path} was changed or removed while it was published; publish when nothing writes")


def plan_files(run_dir: str | Path, *, include: Iterable[str] = (), secrets: Iterable[str] = ()) -> PublishPlan:
    """Decide which files of a run's directory to upload.

    Args:
        run_dir: The directory.
        include: Patterns of further files, such as ``optimizer.pt`` or ``checkpoint-100/*``.
        secrets: Strings that no file may hold, beside those of this process.

    Returns:
        The files, and what is left out and why.

    Raises:
        ValueError: There is no such directory, nothing to upload in it, a pattern that names no file, or a file that is
            damaged or holds a secret.
    """
    root = Path(run_dir)
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory: give the directory of a finished run")
    include = tuple(include)
    parts = _part_folders(root)
    in_parts = (f"{folder}/{name}" for folder in parts for name in _PART)
    in_adapters = (f"{folder}/{name}" for folder in _adapter_folders(root) for name in _MODEL)
    allowed = (*ALLOWED, *in_parts, *in_adapters, *_own_code(root, parts), *include)
    files, left_out, written = [], [], []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        reason = _reason_against(path, name, allowed)
        if reason is None:
            files.append((name, path.stat().st_size))
            written.append(path.stat().st_mtime_ns)
        else:
            left_out.append((name if name.isprintable() else ascii(name), reason))
    _require_effect(root, include, [name for name, _ in files], left_out)
    if not any(name.endswith(".safetensors") for name, _ in files):
        pickled = any(name in ("pytorch_model.bin", "adapter_model.bin") for name, _ in left_out)
        hint = "save them again with safe_serialization" if pickled else "is it the directory of a finished run?"
        if any(path.is_symlink() for path in root.glob("*.safetensors")):
            hint = "a symbolic link is not followed, so copy there what it leads to"
        checkpoints = sorted(root.glob("checkpoint-*/*.safetensors"), key=lambda path: path.stat().st_mtime)
        if checkpoints:
            newest = checkpoints[-1].parent
            hint = f"{newest} does; write its card with `hf-sai card {newest}`, and publish that"
        raise ValueError(f"{root} holds no weights (*.safetensors) to publish: {hint}")
    hidden = known_secrets(secrets)
    for name, _ in files:
        damage = _damage(root / name)
        if damage is not None:
            raise ValueError(f"{root / name} is damaged or not written to its end ({damage}); save it again")
        found = find_secret(root / name, name, hidden)
        if found is not None:
            place = redact_text(f"{root / name} ({found[0]})")
            raise ValueError(f"{place} holds {found[1]}; take it out before it is public (and revoke it)")
    return PublishPlan(tuple(files), tuple(left_out), tuple(written))


def worth_telling(plan: PublishPlan) -> str | None:
    """What an upload leaves out that somebody may miss, in one sentence; None where it is only a training's own.

    Args:
        plan: What publishing would upload.
    """
    names = [name for name, _ in plan.left_out if not _OF_TRAINING.fullmatch(name)]
    if not names:
        return None
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return (
        f"left out of the upload: {', '.join(names[:_MOST_NAMES])}{more}; --include PATTERN (include=[PATTERN]) takes "
        "in what is to be public and has no secret's name"
    )


def adapter_folder(directory: str | Path) -> str | None:
    """The folder in which PEFT saved an adapter that has a name of its own; None for one in the directory itself.

    Args:
        directory: The run's directory.
    """
    directory = Path(directory)
    if (directory / "adapter_config.json").is_file():
        return None
    return next(iter(_adapter_folders(directory)), None)


def is_tokenizer(name: str) -> bool:
    """Whether a file of a run belongs to its tokenizer.

    Args:
        name: The file's path below the run's directory.
    """
    return any(_matches(name, pattern) for pattern in _TOKENIZER)


def _adapter_folders(root: Path) -> list[str]:
    folders = sorted(file.parent for file in root.glob("*/adapter_config.json"))
    return [
        path.name for path in folders if not re.fullmatch(r"checkpoint-\d+|\..*", path.name) and not path.is_symlink()
    ]


def _part_folders(root: Path) -> list[str]:
    """The folders in which a pipeline or sentence-transformers keep parts of what they load, also within each other."""
    found: list[str] = []
    waiting = [""]
    while waiting:
        folder = root / waiting.pop()
        pipeline = _index(folder / _PIPELINE_INDEX, "the index of a diffusers pipeline")
        modules = _index(folder / _MODULES, "a list of sentence-transformers' modules")
        names = [key for key, value in _items(pipeline) if isinstance(value, list)]
        names += [str(entry.get("path")) for entry in _entries(modules)]
        names += [name for name, _ in _routes(folder)]
        if modules is not None:  # its own names for them
            names += [path.name for path in sorted(folder.glob("[0-9]_*"))]
        for name in dict.fromkeys(names):
            # Names are no patterns here: \w has none of their signs.
            path = folder / name
            if re.fullmatch(r"\w[\w-]*", name) and path.is_dir() and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
                waiting.append(found[-1])
    return found


def _own_code(root: Path, parts: Iterable[str]) -> set[str]:
    """A model's own code, and the files that it imports from beside it."""
    waiting = [path for pattern in _CODE for path in root.glob(pattern)]
    waiting += [path for folder in parts for path in (root / folder).glob("*.py")]
    waiting += [_file_of(root, name) for name in _named_modules(root) if re.fullmatch(r"\w+(\.\w+)*", name)]
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in found and path.is_file() and not path.is_symlink():
            found.add(path)
            waiting += _imported(path, root)
    return {path.relative_to(root).as_posix() for path in found}


def _named_modules(root: Path) -> Iterator[str]:
    """Modules that a configuration or an index names as this model's own, or that may be installed ones."""
    for file in sorted(root.glob("*config.json")):
        for _, value in _items(dict(_items(_index(file, "a configuration", strict=False))).get("auto_map")):
            for reference in value if isinstance(value, list) else [value]:
                if isinstance(reference, str) and "--" not in reference:
                    yield reference.rpartition(".")[0]
    pipeline = dict(_items(_index(root / _PIPELINE_INDEX, "", strict=False))).get("_class_name")
    if isinstance(pipeline, list):
        yield str(pipeline[0] if pipeline else "")
    kinds = [entry.get("type") for entry in _entries(_index(root / _MODULES, "", strict=False))]
    yield from (str(kind).rpartition(".")[0] for kind in [*kinds, *(kind for _, kind in _routes(root))])


def _routes(folder: Path) -> Iterator[tuple[str, Any]]:
    """(folder, class) of what a router of sentence-transformers leads to; early ones wrote it into ``config.json``."""
    for name in (_ROUTER, "config.json"):
        yield from _items(dict(_items(_index(folder / name, "", strict=False))).get("types"))


def _imported(path: Path, root: Path) -> Iterator[Path]:
    """Where the modules would lie that a file imports from its own package."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in somebody's strings
            tree = ast.parse(read_text(path, _MAX_INDEX_BYTES))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(path.relative_to(root).parts):
            package = path.parents[node.level - 1]
            module = node.module or ""
            for name in (module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)):
                yield _file_of(package, name)
                parts = name.split(".")
                yield from (package.joinpath(*parts[:end], "__init__.py") for end in range(len(parts) + 1))


def _file_of(folder: Path, module: str) -> Path:
    return folder / f"{module.replace('.', '/')}.py"


def _items(content: Any) -> Iterable[tuple[str, Any]]:
    return content.items() if isinstance(content, dict) else ()


def _entries(content: Any) -> list[dict[str, Any]]:
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def _index(path: Path, what: str, strict: bool = True) -> Any:
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return json.loads(read_text(path, _MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        if strict:
            raise ValueError(f"{path} is not {what}: {error}") from None
        return None


def _reason_against(path: Path, name: str, allowed: tuple[str, ...]) -> str | None:
    parts = name.lower().split("/")
    if any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in NEVER):
        return "never uploaded"
    if path.is_symlink() or not path.is_file():
        return "not a plain file"
    if not name.isprintable():
        return "its name has signs that cannot be shown"
    if any(_matches(name, pattern) for pattern in allowed):
        return None
    return "not on the list; --include it if it is to be public"


def _require_effect(root: Path, include: Iterable[str], files: list[str], left_out: list[tuple[str, str]]) -> None:
    """Raise ValueError for a pattern that names no file, and warn of files that are asked for and stay out."""
    for pattern in include:
        names = [name for name, _ in left_out if _matches(name, pattern)]
        if not names and not any(_matches(name, pattern) for name in files):
            raise ValueError(f"include: {pattern!r} names no file in {root}; * does not reach into folders")
        if pattern in names:
            logger.warning("%s stays out, though it is asked for: %s.", pattern, dict(left_out)[pattern])


def _damage(path: Path) -> str | None:
    """Why nobody could load weights or settings from a file; None where it is whole, or of another kind."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt"):
                    return None
            except SafetensorError as error:
                return str(error)
        if path.suffix == ".json":
            content = json.loads(path.read_bytes())
            if path.name.endswith(".safetensors.index.json"):
                shards = dict(_items(dict(_items(content)).get("weight_map"))).values()
                return next((f"{name} is not there" for name in shards if not (path.parent / str(name)).exists()), None)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {' '.join(str(error).split())}"
    return None


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))
