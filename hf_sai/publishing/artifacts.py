"""What a finished run is given beside its weights, in one call: pictures and a model card."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from hf_sai.publishing.cards import prepare_card
from hf_sai.runs.environment import is_main_process
from hf_sai.runs.files import atomic_write
from hf_sai.runs.record import RunRecord

__all__ = ["PICTURES", "finish_run"]

logger = logging.getLogger(__name__)

#: The folder of a run in which its pictures are.
PICTURES = "pictures"


def finish_run(
    directory: str | Path,
    *,
    twins: Iterable[str | Path] = (),
    template: str | Path | None = None,
    repo_id: str | None = None,
) -> list[Path]:
    """Draw a run's pictures and write its model card, from its record; other processes than the main one do nothing.

    Args:
        directory: The run's directory, with its ``run_record.json``.
        twins: Directories or records of runs to compare with. Default: those of the card before.
        template: A Jinja template for the card instead of the package's own.
        repo_id: Where the model will be on the Hub.

    Returns:
        The files written: the card last.

    Raises:
        ValueError: The record, a twin's record, the template or the card that is there cannot be read.
        OSError: A file cannot be written.
    """
    if not is_main_process():
        return []
    directory, twins = Path(directory), list(twins)
    pictures = _draw(directory, [RunRecord.load(directory), *map(RunRecord.load, twins)])
    names = [path.name for path in pictures]
    # All is made before anything is written: a card that is refused leaves the pictures as they were.
    texts = prepare_card(directory, twins=twins, template=template, repo_id=repo_id, pictures=names)
    written = [atomic_write(path, content) for path, content in (pictures | texts).items()]
    return [*written[: len(pictures)], written[-1]]


def _draw(directory: Path, records: list[RunRecord]) -> dict[Path, bytes]:
    """The run's pictures and where they belong."""
    from hf_sai.publishing import plots

    own = records[0]
    files: dict[Path, bytes] = {}
    jobs = {"loss": (plots.plot_loss, records), "gsnr": (plots.plot_gsnr, own), "updates": (plots.plot_updates, own)}
    for name, (plot, shown) in jobs.items():
        path = directory / PICTURES / f"{name}.png"
        if name == "loss" and own.twins and len(records) == 1 and path.exists():
            continue  # drawn with its twins, whose curves are not at hand now
        try:
            files[path] = plots.draw(plot(shown))  # type: ignore[operator]
        except ValueError as reason:  # the run has nothing to draw of this kind
            logger.info("No %s picture: %s", name, reason)
        except ImportError as reason:
            logger.warning("The card has no pictures: %s", reason)
            return {}
    return files
