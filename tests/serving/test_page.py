"""The page in a browser: search, caption, the attention behind each word, by mouse and keyboard."""

import os
import shutil

import live_server
import numpy as np
import pytest

from unified_mm.analysis.attention_maps import attention_over_patches

pytestmark = pytest.mark.slow

TOKEN = "a-token-of-some-length"
BROWSER, DRIVER = (
    os.environ.get(variable) or shutil.which(name)
    for variable, name in (("CHROME", "chromium"), ("CHROMEDRIVER", "chromedriver"))
)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--window-size=1280,1000",
)


@pytest.fixture(scope="module")
def browser():
    if not (BROWSER and DRIVER):
        pytest.skip(
            "LEFT OUT: the page was NOT tested, as there is no Chromium here; "
            "apt-get install chromium chromium-driver"
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def model():
    return live_server.model(model__modalities__text__length=64)  # every word has its map


@pytest.fixture(scope="module")
def pictures():
    return {f"{number}.png": live_server.png((60, 40), seed=number) for number in range(3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture
def running(model, pictures, folder, request):
    index = live_server.indexed(model, pictures, folder)
    engine = live_server.ByHand(room=1000, says=("a red", " cube <b>left</b>", " of it"))
    token = getattr(request, "param", None)
    with live_server.Running(
        model, engine, index=index, attend=attention_over_patches, token=token
    ) as running:
        yield running


@pytest.fixture
def page(browser, running):
    browser.get(running.url)
    shown(browser, "#search-part")
    yield browser
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def all_of(page, selector):
    return page.find_elements("css selector", selector)


def one(page, selector):
    return page.find_element("css selector", selector)


def shown(page, selector):
    """Waits for an element to be seen."""
    live_server.eventually(lambda: any(each.is_displayed() for each in all_of(page, selector)), 30)
    return one(page, selector)


def heat(page):
    """How many pixels of the heat map are not clear, and how many colours they have."""
    return page.execute_script(
        """const canvas = document.getElementById("heat");
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const colours = new Set(), words = new Uint32Array(pixels.data.buffer);
        let drawn = 0;
        for (const word of words) if (word) { drawn += 1; colours.add(word); }
        return {drawn: drawn / words.length, colours: colours.size,
                word: canvas.dataset.word ?? null};"""
    )


def captioned(page, path):
    one(page, "#file").send_keys(str(path))
    shown(page, ".word")
    return all_of(page, ".word")


def test_pictures_of_the_index_are_there_at_once_and_can_be_asked_about(page):
    from selenium.webdriver.common.keys import Keys

    live_server.eventually(lambda: len(all_of(page, "#found button")) == 3, 30)
    assert "3 of the 3 pictures here" in one(page, "#found-says").text
    assert all_of(page, "#found .number") == []  # nothing was compared
    loaded = "return [...document.querySelectorAll('#found img')].every(i => i.naturalWidth > 0)"
    live_server.eventually(lambda: page.execute_script(loaded), 30)
    all_of(page, "#found button")[1].click()
    shown(page, ".word")
    pressed = [each.get_attribute("aria-pressed") for each in all_of(page, "#found button")]
    assert pressed == [None, "true", None]
    one(page, "#question").send_keys("what is it?" + Keys.ENTER)
    live_server.eventually(lambda: len(all_of(page, ".said .word")) == 12, 30)


def test_typing_finds_pictures_and_a_found_one_can_be_looked_at(page):
    from selenium.webdriver.common.keys import Keys

    one(page, "#query").send_keys("a red square" + Keys.ENTER)
    live_server.eventually(lambda: len(all_of(page, "#found .number")) == 3, 30)
    loaded = "return [...document.querySelectorAll('#found img')].every(i => i.naturalWidth > 0)"
    live_server.eventually(lambda: page.execute_script(loaded), 30)
    assert "3 pictures nearest to “a red square”" in one(page, "#found-says").text
    one(page, "#found button").click()
    shown(page, ".word")
    assert one(page, "#picture").get_attribute("src").startswith("blob:")


def test_a_picture_is_captioned_and_each_word_shows_where_attention_lay(page, folder):
    from selenium.webdriver.common.action_chains import ActionChains

    words = captioned(page, folder / "1.png")
    # What looks like HTML is text.
    assert [word.text for word in words] == "a red cube <b>left</b> of it".split()
    assert heat(page)["word"] is None
    ActionChains(page).move_to_element(words[1]).perform()
    live_server.eventually(lambda: heat(page)["word"] == "red")
    drawn = heat(page)
    # The model sees the central square of 60 x 40 pixels.
    assert drawn["drawn"] == pytest.approx(2 / 3, abs=0.02) and drawn["colours"] > 20
    words[2].click()
    assert words[2].get_attribute("aria-pressed") == "true" and heat(page)["word"] == "cube"
    ActionChains(page).move_to_element(one(page, "h1")).perform()
    assert heat(page)["word"] == "cube"  # it is kept


def test_all_of_it_works_with_the_keyboard_alone(page, folder):
    from selenium.webdriver.common.keys import Keys

    words = captioned(page, folder / "0.png")
    page.execute_script("arguments[0].focus()", words[0])
    assert heat(page)["word"] == "a"
    page.switch_to.active_element.send_keys(Keys.TAB)
    assert page.switch_to.active_element == words[1] and heat(page)["word"] == "red"
    words[1].send_keys(Keys.ENTER)
    assert words[1].get_attribute("aria-pressed") == "true"
    words[1].send_keys(Keys.ESCAPE)
    assert words[1].get_attribute("aria-pressed") == "false"


def test_a_picture_is_asked_about_classified_and_compared(page, folder):
    from selenium.webdriver.common.keys import Keys

    captioned(page, folder / "2.png")
    one(page, "#question").send_keys("what is it?" + Keys.ENTER)
    live_server.eventually(lambda: len(all_of(page, ".said .word")) == 12, 30)
    assert all_of(page, ".said small")[1].text == "what is it?"
    one(page, "#classes").send_keys("red, blue,, green" + Keys.ENTER)
    live_server.eventually(lambda: len(all_of(page, "#ranking li")) == 3, 30)
    one(page, "#like").click()
    live_server.eventually(lambda: len(all_of(page, "#found .number")) == 3, 30)
    assert all_of(page, "#found .number")[0].text == "1.00"


def test_a_sound_finds_pictures(browser, pictures, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    sound = {"type": "audio", "seconds": 0.2, "mels": 8, "patch": (5, 4), "mean": 0.0, "std": 1.0}
    hearing = live_server.model(
        model__modalities__audio=sound, objectives__contrastive__between="image,audio,text"
    )
    index = live_server.indexed(hearing, pictures, tmp_path)
    soundfile.write(tmp_path / "a bark.WAV", 0.1 * np.sin(np.arange(2000)), 16_000)
    with live_server.Running(hearing, index=index) as running:
        browser.get(running.url)
        assert shown(browser, "#item-part").text == "Search by audio"
        assert ".flac" in one(browser, "#item").get_attribute("accept").split(",")
        one(browser, "#item").send_keys(str(tmp_path / "a bark.WAV"))
        live_server.eventually(lambda: len(all_of(browser, "#found .number")) == 3, 60)
        assert "3 pictures nearest to a bark.WAV" in one(browser, "#found-says").text
        heard = "return document.getElementById('heard').duration"
        live_server.eventually(lambda: browser.execute_script(heard) == pytest.approx(0.125), 30)
        vector = index.embed(hearing, [tmp_path / "a bark.WAV"], "audio")[0]
        scores = [f"{each.score:.2f}" for each in index.search(vector, 3)]
        assert [each.text for each in all_of(browser, "#found .number")] == scores
        assert [each for each in browser.get_log("browser") if each["level"] == "SEVERE"] == []


def test_what_goes_wrong_is_said_and_the_page_goes_on(page, folder):
    wrong = folder / "broken.png"
    wrong.write_bytes(live_server.png()[:60])
    one(page, "#file").send_keys(str(wrong))
    said = shown(page, "#problem").text
    assert "cannot be decoded" in said or "no picture" in said
    assert captioned(page, folder / "0.png")
    assert not one(page, "#problem").is_displayed()
    # A refused request is logged by the browser itself.
    assert len(page.get_log("browser")) <= 2


@pytest.mark.parametrize("running", [TOKEN], indirect=True)
def test_a_token_is_asked_for_once(page, folder):
    from selenium.webdriver.common.keys import Keys

    one(page, "#file").send_keys(str(folder / "0.png"))
    shown(page, "#gate")
    one(page, "#token").send_keys(TOKEN + Keys.ENTER)
    shown(page, ".word")
    assert not one(page, "#gate").is_displayed()
    page.get_log("browser")  # the refused one
    page.refresh()
    assert captioned(page, folder / "1.png")


def test_the_api_is_described_without_help_from_elsewhere(page, running):
    page.get(f"{running.url}/docs")
    live_server.eventually(lambda: len(all_of(page, ".route")) == 9, 30)
    text = one(page, "body").text
    assert "/caption" in text and "-F image=@photo.jpg" in text and "429" in text
