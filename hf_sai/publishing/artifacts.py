"""What a finished run is given beside its weights, in one call: pictures and a model card."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from hf_sai.publishing.cards import write_card
from hf_sai.publishing.twins import find_twins
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
    twins: Iterable[str | Path] | None = None,
    template: str | Path | None = None,
    repo_id: str | None = None,
) -> list[Path]:
    """Draw a run's pictures and write its model card, from its record; other processes than the main one do nothing.

    Args:
        directory: The run's directory, with its ``run_record.json``.
        twins: Directories or records of runs to compare with. Default: see :func:`hf_sai.publishing.twins.find_twins`.
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
    directory = Path(directory)
    twins = find_twins(directory) if twins is None else list(twins)
    files = _draw(directory, [RunRecord.load(directory), *map(RunRecord.load, twins)])
    return [*files, write_card(directory, twins=twins, template=template, repo_id=repo_id)]


def _draw(directory: Path, records: list[RunRecord]) -> list[Path]:
    from hf_sai.publishing import plots

    own = records[0]
    files: list[Path] = []
    jobs = {"loss": (plots.plot_loss, records), "gsnr": (plots.plot_gsnr, own), "updates": (plots.plot_updates, own)}
    for name, (plot, shown) in jobs.items():
        first = directory / PICTURES / f"{name}-light.png"
        if name == "loss" and own.twins and len(records) == 1 and first.exists():
            continue  # drawn with its twins, whose curves are not at hand now
        for theme in plots.THEMES:
            try:
                content = plots.draw(plot(shown, theme))  # type: ignore[operator]
            except ValueError as reason:  # the run has nothing to draw of this kind
                logger.info("No %s picture: %s", name, reason)
                break
            except ImportError as reason:
                logger.warning("The card has no pictures: %s", reason)
                return files
            files.append(atomic_write(first.with_name(f"{name}-{theme}.png"), content))
    return files
