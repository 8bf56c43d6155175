"""What the load test asks, and the whole of it in small."""

import json
import random

import live_server
import pytest
import tiny

from experiments import load_test
from experiments.load_requests import Asked, broken_requests, two_hundred_megapixels
from unified_mm.serving.limits import Limits, Refusal
from unified_mm.serving.pictures import check_header


def test_one_in_twenty_is_broken_and_every_kind_comes():
    good = [Asked("good", "/caption", lambda response: "")]
    order = load_test.mixed(good, 2000, random.Random(0))
    broken = [each for each in order if each.broken]
    assert len(order) == 2000 and len(broken) == 100
    assert {each.kind for each in broken} == {each.kind for each in broken_requests()}
    assert not all(each.broken for each in order[:100])


def test_the_large_picture_is_small_until_it_is_decoded():
    content = two_hundred_megapixels()
    assert len(content) < 100_000
    with pytest.raises(Refusal, match="the limit of") as refused:
        check_header(content, Limits(), "image")
    assert refused.value.status == 413


@pytest.mark.slow
def test_nothing_is_lost_or_wrong_in_small(tmp_path):
    longer = {"model__modalities__text__length": 48}  # there are questions to be read
    params = tiny.params(tiny.task(**longer))
    run = tiny.write_run(tmp_path / "run", tiny.config_dict(**longer), params)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        content = live_server.png((20, 20), seed=number)
        (pictures / f"{number}.png").write_bytes(content)
    arguments = ("--run", str(run), "--images", str(pictures), "--results", str(tmp_path))
    code = load_test.main([*arguments, "--requests", "80", "--clients", "8"])
    result = json.loads((tmp_path / "load_test.json").read_text())
    assert code == 0, result
    assert result["answered"] == 80 and result["broken"] == 4 and result["wrong"] == 0
    assert result["exit_code"] == 0 and result["memory_at_the_end"]["array_bytes"] > 0
