"""A recipe of a user's: every part of it that can be is from `toy_parts` and `toy_rules`."""

import tiny


def get_config():
    config = tiny.config_dict(
        model__feed_forward_type="toy_parts:Summing",
        model__attention="toy_parts:Written",
        objectives__matching__weight=0.0,
        objectives__captioning__rule="toy_rules:WINDOWED",
        objectives__captioning__weight_schedule="toy_parts:half",
        objectives__contrastive__pool="toy_parts:largest",
        objectives__contrastive__loss="toy_parts:MARGIN",
        train__optimizer="toy_parts:sign",
        train__schedule="toy_parts:falling",
        train__treatment="toy_parts:Counting",
        train__warmup_steps=0,
        train__steps=3,
        train__batch_size=8,
        logging__every=1,
        checkpoint__every=2,
    )
    config.model.feed_forward_options.widen = 3
    config.train.pace = 0.25
    config.objectives.calm = {"type": "toy_parts:Calm", "weight": 0.1, "noise": 0.5}
    return config
