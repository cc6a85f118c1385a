"""Speech data sets, as log-mel spectrograms of 32 filters with a window of 25 ms and a stride of 10 ms."""

import hashlib
import math
import re
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparing.data.cache import cached
from sparing.data.sequence import SequenceData, Sequences, normalized
from sparing.errors import InputError
from sparing.files import open_regular, read_text

FILTERS = 32
WINDOW, STRIDE = 0.025, 0.010
"""Length of a window and stride between windows, in seconds."""

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = len(WORDS), len(WORDS) + 1
NOISE = "_background_noise_"
SPEECH_COMMANDS_PAGE = "https://www.tensorflow.org/datasets/catalog/speech_commands"
FSDD_PAGE = "https://github.com/Jakobovski/free-spoken-digit-dataset"


class Clip(NamedTuple):
    """Section of a WAV file: its samples times `volume`, and zeros up to `samples` if `padded`."""

    path: Path
    label: int
    samples: int
    padded: bool = True
    start: int = 0
    volume: float = 1.0


def google12(root: str = "data/speech_commands", cache: str | None = None) -> SequenceData:
    """Load Google-12: ten words, "unknown" and "silence" of Speech Commands, 1 s at 16 kHz (99 time steps × 32).

    Classes 0 to 9 are `WORDS`, class 10 is any other word, class 11 is background noise. In each split, the number
    of unknown words and the number of silences are each 10% of the number of examples of the ten words. (The
    FastGRNN paper has 22,246 training and 3,081 test examples, from version 1 of the archive; not verified here.)

    The splits are those of the lists in the archive; no speaker is in two. Silences are sections of the archive's
    noise files with a random volume between 0 and 1: from the first 80% of each file for training, the next 10% for
    validation, the last 10% for the test. Each filter is normalized with its mean and std over the training split.

    Args:
        root: folder of the unpacked archive, with one folder per word and `_background_noise_`.
        cache: file for the computed spectrograms. None uses `google12.safetensors` in `root`.

    Reference: Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", 2018.
    Deviation: TensorFlow's speech_commands example draws the unknown words at random; here they are those with the
    smallest SHA-1 hash of their names.
    """
    folder = Path(root).expanduser()
    if absent := [name for name in (*WORDS, NOISE) if not (folder / name).is_dir()]:
        raise InputError(
            f"data google12: {folder} has no folder {absent[0]!r} ({len(absent)} of {len(WORDS) + 1} are missing); "
            f"unpack speech_commands_v0.01.tar.gz ({SPEECH_COMMANDS_PAGE}) and set data.root to its folder"
        )
    clips: dict[str, list[Clip]] = {"train": [], "validation": [], "test": []}
    others: dict[str, list[Path]] = {split: [] for split in clips}
    listed = _listed_splits(folder)
    for path in sorted(folder.glob("*/*.wav")):
        word, split = path.parent.name, listed.get(_relative(path), "train")
        if word in WORDS:
            clips[split].append(Clip(path, WORDS.index(word), 16_000))
        elif word != NOISE:
            others[split].append(path)
    noises = sorted((folder / NOISE).glob("*.wav"))
    if not noises:
        raise InputError(f"data google12: {folder / NOISE} has no .wav files; unpack the archive again")
    for split, examples in clips.items():
        count = math.ceil(len(examples) / 10)
        chosen = sorted(others[split], key=lambda path: hashlib.sha1(_relative(path).encode()).hexdigest())[:count]
        examples += [Clip(path, UNKNOWN, 16_000) for path in chosen]
        examples += _silences(noises, split, count)
    return _build("google12", clips, 16_000, Path(cache or folder / "google12.safetensors"), 12)


def spoken_digits(root: str = "data/fsdd", cache: str | None = None) -> SequenceData:
    """Load the Free Spoken Digit Dataset: ten digits of six speakers at 8 kHz, with variable lengths of up to 1 s.

    Recordings 0 to 4 of each speaker and digit are the test split, as the authors of the data set propose,
    recordings 5 to 9 are the validation split, and the others are the training split. Each filter is normalized
    with its mean and std over the training split.

    Args:
        root: folder that contains `recordings`, or the folder of the recordings.
        cache: file for the computed spectrograms. None uses `spoken_digits.safetensors` in `root`.

    Reference: Jackson et al., https://github.com/Jakobovski/free-spoken-digit-dataset.
    """
    folder = Path(root).expanduser()
    named = re.compile(r"([0-9])_(\w+)_(\d+)\.wav")
    clips: dict[str, list[Clip]] = {"train": [], "validation": [], "test": []}
    spoken: dict[tuple[str, int], set[int]] = {}
    recordings = folder / "recordings" if (folder / "recordings").is_dir() else folder
    for path in sorted(recordings.glob("*.wav")):
        match = named.fullmatch(path.name)
        if match is None:
            raise InputError(f"data {path}: the file name must be <digit>_<speaker>_<number>.wav, see {FSDD_PAGE}")
        digit, number = int(match[1]), int(match[3])
        split = "test" if number < 5 else "validation" if number < 10 else "train"
        clips[split].append(Clip(path, digit, 8_000, padded=False))
        spoken.setdefault((match[2], number), set()).add(digit)
    if not all(clips.values()):
        raise InputError(
            f"data spoken_digits: {folder} is incomplete, with {sum(map(len, clips.values()))} recordings; download "
            f"all from {FSDD_PAGE} and set data.root to their folder"
        )
    for (speaker, number), digits in spoken.items():
        for digit in set(range(10)) - digits:
            raise InputError(
                f"data spoken_digits: {recordings / f'{digit}_{speaker}_{number}.wav'} is missing; download all "
                f"recordings from {FSDD_PAGE}"
            )
    return _build("spoken_digits", clips, 8_000, Path(cache or folder / "spoken_digits.safetensors"), 10)


def log_mel(samples: Tensor, rate: int) -> Tensor:
    """Compute the log-mel spectrogram of a recording.

        steps = ⌈(n − window) / stride⌉ + 1

    The last window is padded with zeros. The windows are Hann windows, with pre-emphasis 0.97, and the values are
    natural logarithms of the power. There is no dither, so the result is deterministic.

    Args:
        samples: the recording, (n,).
        rate: sampling rate in Hz.

    Examples:
        >>> log_mel(torch.zeros(16_000), 16_000).shape
        torch.Size([99, 32])
    """
    try:
        from kaldi_native_fbank import FbankOptions, OnlineFbank
    except ImportError as error:
        raise InputError("speech data sets need kaldi-native-fbank: pip install kaldi-native-fbank") from error
    if not len(samples):
        raise InputError("a recording must have at least one sample, got 0")
    window, stride = round(WINDOW * rate), round(STRIDE * rate)
    steps = max(0, -(-(len(samples) - window) // stride)) + 1
    options = FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = FILTERS
    extractor = OnlineFbank(options)
    extractor.accept_waveform(rate, pad(samples, (0, (steps - 1) * stride + window - len(samples))).tolist())
    extractor.input_finished()
    return torch.stack([torch.from_numpy(extractor.get_frame(step).copy()) for step in range(steps)])


def read_wav(path: Path, rate: int) -> Tensor:
    """Read a 16-bit mono WAV file of a sampling rate in Hz. The samples, (n,), float32, are not scaled."""
    try:
        with open_regular(path) as stream, wave.open(stream) as file:
            found = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            expected = file.getnframes()
            # The header can promise more than the file has, and reading would allocate it.
            raw = file.readframes(min(expected, path.stat().st_size)) if found == (rate, 1, 16) else b""
    except (OSError, EOFError, wave.Error, RuntimeError, ValueError) as error:
        raise InputError(f"data {path}: not a readable WAV file ({str(error) or 'unexpected end of file'})") from error
    if found != (rate, 1, 16):
        raise InputError(
            f"data {path}: must have {rate} Hz, 1 channel and 16 bits, got {found[0]} Hz, {found[1]} channel(s) and "
            f"{found[2]} bits"
        )
    if len(raw) != 2 * expected or not raw:
        raise InputError(f"data {path}: truncated or empty: contains {len(raw) // 2} of {expected} samples")
    return torch.frombuffer(bytearray(raw), dtype=torch.int16).float()


def _listed_splits(folder: Path) -> dict[str, str]:
    """Return the split of each recording in the lists of the archive; no speaker is in two."""
    listed: dict[str, str] = {}
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        listed |= dict.fromkeys(read_text(folder / name, f"data {folder / name}").split(), split)
    if missing := [line for line in listed if not (folder / line).is_file()]:
        raise InputError(
            f"data google12: {folder / missing[0]} is missing ({len(missing)} of the {len(listed)} listed recordings "
            "are missing); unpack the archive again"
        )
    return listed


def _relative(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _silences(noises: Sequence[Path], split: str, count: int) -> list[Clip]:
    """Draw sections of 1 s from the noise files, each from the range of its file that belongs to the split."""
    begin, end = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}[split]
    lengths = [len(read_wav(path, 16_000)) for path in noises]
    generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[split])
    clips = []
    for index in range(count):
        length = lengths[index % len(noises)]
        position, volume = torch.rand(2, generator=generator).tolist()
        first, last = round(begin * length), max(round(end * length) - 16_000, round(begin * length))
        start = first + round(position * (last - first))
        clips.append(Clip(noises[index % len(noises)], SILENCE, 16_000, start=start, volume=volume))
    return clips


def _build(name: str, clips: dict[str, list[Clip]], rate: int, cache: Path, num_classes: int) -> SequenceData:
    """Build a data set from clips. If the cache was made from the same clips, the spectrograms are read from it."""
    for split, examples in clips.items():
        if not examples:
            raise InputError(f"data {name}: the {split} split is empty; unpack the archive again")

    def compute() -> dict[str, Tensor]:
        tensors = {}
        for split, examples in clips.items():
            spectrograms = [log_mel(_read_clip(clip, rate), rate) for clip in examples]
            tensors[f"{split}.values"] = torch.nn.utils.rnn.pad_sequence(spectrograms, batch_first=True)
            tensors[f"{split}.lengths"] = torch.tensor([len(spectrogram) for spectrogram in spectrograms])
        return tensors

    def is_valid(found: dict[str, Tensor]) -> bool:
        pairs = [(found[f"{split}.values"], found[f"{split}.lengths"], len(clips[split])) for split in clips]
        return all(
            (values.dtype, lengths.dtype) == (torch.float32, torch.int64)
            and values.shape == (count, values.shape[1], FILTERS)
            and lengths.shape == (count,)
            and 1 <= int(lengths.min()) <= int(lengths.max()) == values.shape[1]
            for values, lengths, count in pairs
        )

    described = [
        (split, _relative(clip.path), (found := clip.path.stat()).st_size, found.st_mtime_ns, *clip[1:])
        for split, examples in clips.items()
        for clip in examples
    ]
    tensors = cached(cache.expanduser(), (1, rate, FILTERS, WINDOW, STRIDE, described), compute, is_valid)
    splits = []
    for split, examples in clips.items():
        values, lengths = tensors[f"{split}.values"], tensors[f"{split}.lengths"]
        same = bool((lengths == values.shape[1]).all())
        labels = torch.tensor([clip.label for clip in examples])
        splits.append(Sequences(values, labels, None if same else lengths))
    return normalized(name, splits[0], splits[1], splits[2], num_classes)


def _read_clip(clip: Clip, rate: int) -> Tensor:
    samples = clip.volume * read_wav(clip.path, rate)[clip.start : clip.start + clip.samples]
    return pad(samples, (0, clip.samples - len(samples))) if clip.padded else samples
