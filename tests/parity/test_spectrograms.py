"""Spectrograms are those of transformers' `audio_utils`."""

import jax.numpy as jnp
import numpy as np
import pytest

from unified_mm.modalities.spectrogram import PRESETS, log_mel, mel_power

pytestmark = pytest.mark.parity

audio_utils = pytest.importorskip("transformers.audio_utils")


def sounds():
    rng = np.random.default_rng(0)
    time = np.arange(16_000) / 16_000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.05 * rng.normal(size=16_000)
    fading = np.exp(-6 * time) * rng.normal(size=16_000) * 0.2
    return [tone.astype(np.float32), fading.astype(np.float32)]


def theirs(name, wave, mels):
    if name == "whisper":
        filters = audio_utils.mel_filter_bank(
            201, mels, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney"
        )
        window, more = audio_utils.window_function(400, "hann"), {"mel_floor": 1e-10}
    else:
        filters = audio_utils.mel_filter_bank(
            257, mels, 20, 8000, 16_000, None, "kaldi", triangularize_in_mel_space=True
        )
        window = audio_utils.window_function(400, "hann", periodic=False)
        more = {"fft_length": 512, "center": False, "preemphasis": 0.97, "remove_dc_offset": True}
        more["mel_floor"] = 1.192092955078125e-07
    found = audio_utils.spectrogram(
        wave, window, 400, 160, power=2.0, mel_filters=filters, dtype=np.float64, **more
    )
    return (found[:, :-1] if name == "whisper" else found).T


@pytest.mark.filterwarnings("ignore:At least one mel filter")
@pytest.mark.parametrize(("name", "mels"), [("whisper", 80), ("whisper", 128), ("kaldi", 128)])
def test_power_and_its_logarithm(name, mels):
    preset = PRESETS[name]
    for wave in sounds():
        power = theirs(name, wave, mels)
        given = jnp.asarray(wave)[None]
        found = np.maximum(np.asarray(mel_power(preset, given, mels))[0], preset.least)
        np.testing.assert_allclose(found, power, atol=1e-5 * power.max(), rtol=0)
        ours = np.asarray(log_mel(name, given, mels, jnp.ones((1, len(power)), bool)))[0]
        if name == "whisper":
            log = np.log10(power)
            expected = (np.maximum(log, log.max() - 8.0) + 4.0) / 4.0
        else:
            expected = np.log(power)
        loud = power > 1e-8 * power.max()  # -80 dB
        np.testing.assert_allclose(ours[loud], expected[loud], atol=1e-3, rtol=0)
