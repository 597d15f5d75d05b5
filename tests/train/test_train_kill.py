"""Never lose work: runs that are killed at any moment, and resumed, end as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
def test_runs_killed_at_twenty_random_moments_end_bit_identically(tmp_path):
    script = Path(__file__).with_name("kill_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=250, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("thin", "supernet"):
        assert found[name]["kills"] == 20
        assert found[name]["runs"]
        assert all(found[name]["runs"]), f"{name}: a resumed run ended with other weights or figures"
        # Most kills hit an epoch in the middle.
        assert found[name]["within"] >= 5
    assert found["supernet"]["metrics"] == [4, 4]
