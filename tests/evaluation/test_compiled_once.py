"""The evaluations on a run's way and the one at its end share what is compiled."""

from pathlib import Path

import commands
import tiny

from unified_mm.inference.predictor import Predictor

CONFIG = f"--config={Path(__file__).parents[2] / 'configs' / 'coco.py'}:tiny"


def test_each_program_of_an_evaluation_is_traced_once_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "cache"))
    traced, call = [], Predictor.call

    def counted(self, name, function, *args, **options):
        def noted(*given):
            traced.append(name)
            return function(*given)

        return call(self, name, noted, *args, **options)

    monkeypatch.setattr(Predictor, "call", counted)
    data = tiny.write_coco(tmp_path / "coco")
    flags = (CONFIG, *commands.SMALL, "--config.evaluation.every=2", f"--config.data.dir={data}")
    assert commands.run(*flags, f"--workdir={tmp_path / 'run'}") == 0
    assert {"embed image contrastive", "embed text contrastive", "log_likelihood"} < set(traced)
    assert len(traced) == len(set(traced)), traced
