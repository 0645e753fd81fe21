"""A page of records that were made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_records import Made, Tree

from expunge.comparison import Comparison
from expunge.records import RunRecord
from expunge.report.gather import gather
from expunge.report.page import page_of
from expunge.report.render import html


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """``made(records)``: the page of records that were saved and read again."""

    def make(records: list[RunRecord], folder: Path = tmp_path / "runs", **changes: Any) -> Made:
        for at, one in enumerate(records):
            one.save(folder / f"run{at:02}")
        gathered = gather([folder])
        page = page_of(gathered, Comparison.of(gathered.records, **changes))
        text = html(page)
        return Made(page, text, Tree(text).root)

    return make
