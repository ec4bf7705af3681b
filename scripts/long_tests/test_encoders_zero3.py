"""Under ZeRO-3 every type of encoder of `hf_vision` has the features and the gradients of one process."""

import pytest

from tests.model import small
from tests.support import encoders
from tests.support.forks import Forks


@pytest.mark.parametrize("kinds", [[kind for kind in encoders.KINDS if kind not in encoders.MAPS], encoders.MAPS])
def test_every_type(tmp_path, kinds):
    """At another size than the encoder's own, where positions are interpolated from a weight that is in parts."""
    pytest.importorskip("deepspeed")
    checkpoints = []
    for kind in kinds:
        sizes = {} if kind in encoders.FIXED else {"image_size": 96 if kind in encoders.MAPS else 28}
        source = encoders.folder(tmp_path / "towers" / kind, kind)
        model = small.model(source, image_grid_pinpoints="(1x1),...,(2x2)", **sizes)
        model.get_model().describe_vision()
        checkpoints.append(str(tmp_path / kind))
        model.save_pretrained(checkpoints[-1])
    with Forks() as forks:
        status, said = forks.ranks(2, checkpoints, tmp_path / "log", "tests.support.zero3_step:encoders")
    assert status == 0, said[-6000:]
    assert said.count(str(tmp_path / kind)) >= 2
