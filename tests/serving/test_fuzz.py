"""Requests made from the OpenAPI document, right and wrong: every answer is as it says, no 5xx."""

import base64

import live_server
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unified_mm.inference.engine import Engine

pytestmark = pytest.mark.slow

EXAMPLES = 60  # of each route and way of making them
TOKEN = "a-token-of-some-length"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    model = live_server.model()
    index = live_server.indexed(model, {"0.png": live_server.png()}, tmp_path_factory.mktemp("i"))

    def attend(model, view, prompt, text):
        if not text.split():
            raise ValueError("no word")
        return text.split(), np.ones((len(text.split()), 2, 2), np.float32)

    with Engine(model) as engine:
        with live_server.Running(model, engine, index=index, attend=attend, token=TOKEN) as running:
            yield running


@pytest.fixture(scope="module")
def schema(running):
    import schemathesis

    pictures = [live_server.png(), live_server.png((9, 30), format="JPEG"), b"", b"no picture"]
    as_text = [base64.b64encode(each).decode() for each in pictures]
    schemathesis.openapi.format("picture", st.sampled_from(as_text))
    schemathesis.openapi.format("binary", st.sampled_from(pictures))
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


ROUTES = [
    ("/caption", "POST"),
    ("/answer", "POST"),
    ("/embed", "POST"),
    ("/search", "POST"),
    ("/classify", "POST"),
    ("/attention", "POST"),
    ("/pictures/{number}", "GET"),
    ("/healthz", "GET"),
    ("/metrics", "GET"),
]


def test_the_document_has_these_routes(running):
    document = running.client.get("/openapi.json").json()
    assert {path for path, _ in ROUTES} == set(document["paths"])


# The server draws by `random` in its threads, which hypothesis takes for a strategy's doing.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize(("path", "method"), ROUTES)
def test_every_answer_is_as_the_document_says(schema, path, method, mode):
    from schemathesis import GenerationMode
    from schemathesis.checks import CHECKS

    if mode == "negative" and path in ("/healthz", "/metrics"):
        pytest.skip("nothing is asked there that could be wrong")
    # What is right by the document may still be no picture, or need another field beside it.
    always = CHECKS.get_one("positive_data_acceptance")
    # In a form everything is text, and most of what JSON would have by another type is too.
    of_forms = CHECKS.get_one("negative_data_rejection")
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path][method].as_strategy(generation_mode=GenerationMode(mode)))
    def fuzz(case):
        form = case.media_type == "multipart/form-data"
        response = case.call_and_validate(
            headers={"Authorization": f"Bearer {TOKEN}"},
            excluded_checks=[always, of_forms] if form else [always],
        )
        statuses.add(response.status_code)

    fuzz()
    assert 200 in statuses or mode == "negative" or path.startswith("/pictures"), statuses
    assert max(statuses) < 500, statuses
