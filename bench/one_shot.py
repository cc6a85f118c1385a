"""Prune a trained sentence encoder in one step, without training, with and without calibration data.

    python bench/one_shot.py --text vaderSentiment-3.3.2.tar.gz

The model is MiniLM: 6 layers, 10.6 M weights in its encoder, which are pruned; its embeddings stay dense. The sentences
are those of bench/finetune.py, which says where they come from. Each seed draws 128 sentences to calibrate on. Of 1,000
others, the agreement with the dense encoder is measured: the mean cosine of the two embeddings of a sentence, and how
often the nearest neighbour among the 1,000 is the same.

Scores: |W|; |W| · ‖x‖ relative to the mean of its output, as of `sparing.calibrate`; the rank of |W| · ‖x‖ among the
weights of the same output, as in the paper of Wanda; and |W| · ‖x‖ itself, compared over all layers.
Each run writes results/one_shot/<variant>-<percent>-seed<n>.json and is not repeated.
"""

import argparse
from functools import partial

import torch
from torch.nn import functional as F

import sparing
from finetune import TOKENS, folder, read_sentences, where
from ledger import ROOT, write_entry

TEST, CALIBRATION, BATCH = 1000, 128, 32
VARIANTS = {
    "magnitude": ("uniform", None),
    "calibrated": ("uniform", lambda score: score),
    "calibrated_rows": ("uniform", lambda score: partial(rank_in_row, score)),
    "magnitude_global": ("global", None),
    "calibrated_global": ("global", lambda score: score),
    "calibrated_unscaled_global": ("global", lambda score: partial(unscaled, score)),
}
"""Name → budget, and what is made of the calibrated score."""


def unscaled(score, layer, units):
    """Return |W| · ‖x‖."""
    return units.norm(layer.weight * score.norms[layer.name])


def rank_in_row(score, layer, units):
    """Return the rank of |W| · ‖x‖ among the weights of the same output, so that every output keeps as many."""
    return unscaled(score, layer, units).argsort(1).argsort(1)


class Encoder:
    """Embeddings of the sentences of reviews, of equal length and without padding where that can be."""

    def __init__(self, path):
        from transformers import AutoTokenizer

        texts, _ = read_sentences(path)
        tokenizer = AutoTokenizer.from_pretrained(folder())
        tokens = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
        self.ids, self.mask = tokens["input_ids"], tokens["attention_mask"]
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
        self.test, self.rest = order[:TEST], order[TEST:]

    def batches(self, index):
        """Yield parts of the index, and the arguments of the model for each."""
        index = index[self.mask[index].sum(1).argsort()]
        for part in index.split(BATCH):
            length = int(self.mask[part].sum(1).max())
            yield part, {"input_ids": self.ids[part, :length], "attention_mask": self.mask[part, :length]}

    def calibration(self, seed):
        drawn = torch.randperm(len(self.rest), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
        return [arguments for _, arguments in self.batches(self.rest[drawn])]

    @torch.inference_mode()
    def embed(self, model, index):
        """Return the embeddings of sentences: the mean over their tokens, of length 1."""
        found = torch.zeros(len(self.ids), model.config.hidden_size)
        for part, arguments in self.batches(index):
            mask = arguments["attention_mask"].unsqueeze(-1)
            found[part] = F.normalize((model(**arguments).last_hidden_state * mask).sum(1) / mask.sum(1))
        return found[index]


def load_model():
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder(), add_pooling_layer=False).eval()


def agreement(embeddings, dense):
    """Return what embeddings have in common with those of the dense model."""
    ours, theirs = ((each @ each.T).fill_diagonal_(-2).argmax(1) for each in (embeddings, dense))
    cosine = float((embeddings * dense).sum(1).mean())
    return {"cosine": cosine, "neighbours": float((ours == theirs).double().mean())}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="source distribution of vaderSentiment")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--percents", type=int, nargs="+", default=[50, 60])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    encoder = Encoder(options.text)
    dense = encoder.embed(load_model(), encoder.test)
    for variant in options.variants:
        budget, make = VARIANTS[variant]
        for percent in options.percents:
            for seed in options.seeds if make else [0]:  # nothing is drawn for the others
                entry = ROOT / "results" / "one_shot" / f"{variant}-{percent}-seed{seed}.json"
                if entry.is_file():
                    continue
                model = load_model()
                score = make(sparing.calibrate(model, encoder.calibration(seed))) if make else "magnitude"
                method = sparing.GMP(sparsity=percent / 100, budget=budget, begin=0, end=0, score=score)
                sparing.sparsify_(model, method)
                sparsity = sparing.report(model).sparsified.sparsity
                found = agreement(encoder.embed(model, encoder.test), dense)
                result = {
                    "recipe": "bench/one_shot.py", "variant": variant, "percent": percent, "seed": seed, **where(),
                    "sparsity": sparsity, **found,
                }  # fmt: skip
                write_entry(entry, result)
                print(f"{entry.stem}: {found}", flush=True)


if __name__ == "__main__":
    main()
