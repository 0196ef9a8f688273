"""The README's Python runs as it stands, in one piece, as a reader would type it."""

import re

from tests.packaging.conftest import ROOT
from tests.support.process import normal_process


@normal_process
def test_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    B, T = names["B"], names["T"]
    assert names["o"].shape == names["q"].shape == (B, T, names["H"], names["D"])
    assert names["q"].grad.abs().sum() > 0
    assert names["text"].shape == (B, T, 256)
    assert names["token"].shape == (B, 1, 256)
    assert names["logits"].shape == (B, T, 512)
