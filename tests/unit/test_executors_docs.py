"""The example of the explanation page gives the output that the page shows."""

from __future__ import annotations

import re


def test_the_page_shows_what_its_example_prints(repo, capsys):
    page = (repo / "docs" / "explanation" / "executors.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (output,) = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(code, "executors.md", "exec"), {})
    assert capsys.readouterr().out == output
