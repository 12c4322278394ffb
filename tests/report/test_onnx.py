"""The table and the page of flashhead bench onnx: the numbers are those of the document."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from bench_onnx_document import document
from rich.console import Console

from flashhead_edge.errors import FlashHeadError
from flashhead_edge.report.onnx import onnx_page, show_onnx, write_onnx


def printed() -> str:
    stream = io.StringIO()
    show_onnx(document(), Console(file=stream, width=200))
    return stream.getvalue()


def test_the_table_says_what_is_reached() -> None:
    text = printed()

    def line(*words: str) -> str:
        (found,) = [row for row in text.splitlines() if all(word in row for word in words)]
        return found

    fp32 = line("dense fp32", "100.00 %")
    assert "26.00 (24.00 to 28.00)" in fp32 and "25: reached" in fp32
    assert "4.5: not reached" in line("dense int4", "83.35 %")
    assert "1.69" in text  # what was published
    genai = line("GenAI, int8 head")
    assert "1.30 (1.20 to 1.40)" in genai and "0.99 (0.90 to 1.10)" in genai and "3 of 128" in genai
    assert "not measured: llama.cpp is not installed" in text
    assert "drawn after a head" in text and "1,567" in text


def test_threads_have_tables_of_their_own() -> None:
    text = printed()
    assert "262,144 x 640, 1 thread\n" in text.replace(" \n", "\n").replace("  ", "") and "262,144 x 640, 2 threads" in text


def test_the_page_is_whole_and_self_contained(tmp_path: Path) -> None:
    write_onnx(document(), tmp_path / "plot.html")
    page = (tmp_path / "plot.html").read_text(encoding="utf-8")
    assert page == onnx_page(document())
    assert page.count("<svg class") == 3  # head, models, engines
    assert "FlashHead, 1 threads: 500.0 us a step" in page and "25: reached" in page
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    with pytest.raises(FlashHeadError, match="cannot be written"):
        write_onnx(document(), tmp_path / "nowhere/plot.html")
