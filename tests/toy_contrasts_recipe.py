"""A recipe of a user's: images, tones and texts, held against each other by two objectives."""

import tiny


def get_config():
    config = tiny.config_dict(
        data__source="toy_tone:ToneSource",
        objectives__matching__weight=0.0,
        objectives__captioning__weight=0.0,
        train__steps=3,
        train__batch_size=8,
        logging__every=1,
        checkpoint__every=3,
    )
    config.model.modalities.tone = {"type": "toy_tone:Tone", "samples": 8, "frame": 4}
    contrast = config.objectives.contrastive.to_dict()
    config.objectives.audio_contrast = {**contrast, "between": "tone"}
    config.objectives.both = {**contrast, "between": "image,tone"}
    return config
