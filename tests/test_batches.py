"""What training asks of batches: their number, and that a run can continue in mid-epoch."""

import signal

import pytest

from small_run import recipe
from sparing import InputError
from sparing.data.image import ImageData
from sparing.run.interrupt import Interrupted
from sparing.run.training import train_run


class Own:
    """Batches of somebody's own data set, which leaves out no batches at the beginning."""

    def __init__(self, batches):
        self.batches, self.epoch, self.stop = batches, 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.batches.epoch = self.epoch
        for number, batch in enumerate(self.batches):
            if number == self.stop:
                signal.raise_signal(signal.SIGTERM)
            yield batch


class WithStart(Own):
    start = 0


class Short(WithStart):
    def __iter__(self):
        yield from list(super().__iter__())[:7]


@pytest.fixture
def use(monkeypatch):
    """Make a class the batches of the data set `noise`, of ten batches."""
    original = ImageData.training

    def use(kind, stop=-1):
        def training(self, *arguments):
            batches = kind(original(self, *arguments))
            batches.stop = stop
            return batches

        monkeypatch.setattr(ImageData, "training", training)

    return use


def test_batches_that_cannot_begin_in_mid_epoch_are_refused(use, tmp_path):
    use(Own)
    with pytest.raises(InputError, match=r"the batches of data 'small_run:noise' have no attribute `start`; a run"):
        train_run(recipe(), tmp_path / "run")


def test_a_resumed_run_that_gets_its_batches_again_is_an_error(use, tmp_path):
    use(WithStart, stop=4)
    with pytest.raises(Interrupted):
        train_run(recipe(), tmp_path / "run")
    use(WithStart)
    with pytest.raises(InputError, match=r"more than the 10 batches per epoch of its len\(\), or does not leave"):
        train_run(recipe(), tmp_path / "run", resume=True)


def test_fewer_batches_than_promised_are_an_error(use, tmp_path):
    use(Short)
    with pytest.raises(InputError, match=r"the data has 7 of the 10 batches per epoch"):
        train_run(recipe(), tmp_path / "run")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_fewer_examples_than_the_size_of_a_split_are_an_error(monkeypatch, tmp_path, split):
    """Batches of somebody's own data set have no attribute `examples`."""
    original = ImageData.evaluation

    def evaluation(self, wanted, *arguments):
        batches = list(original(self, wanted, *arguments))
        return [(x[:-1], y[:-1]) if wanted == split else (x, y) for x, y in batches]

    monkeypatch.setattr(ImageData, "evaluation", evaluation)
    with pytest.raises(InputError, match="the data has 39 examples to evaluate, but 40 were promised"):
        train_run(recipe(schedule={"epochs": 1}), tmp_path / "run")
