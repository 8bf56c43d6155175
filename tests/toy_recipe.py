"""A recipe of a user's: three modalities, two of them the package's."""

import tiny


def get_config():
    config = tiny.config_dict(
        data__source="toy_tone:ToneSource",
        objectives__matching__weight=0.0,
        train__steps=60,
        train__batch_size=16,
        train__learning_rate=1e-2,
        train__warmup_steps=5,
        logging__every=20,
        checkpoint__every=60,
    )
    config.model.modalities.tone = {"type": "toy_tone:Tone", "samples": 8, "frame": 4}
    return config
