"""Spoken words, as log-mel spectra of 32 filters in windows of 25 ms, every 10 ms."""

import hashlib
import math
import re
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparing.data.sequence import SequenceData, Sequences, normalized
from sparing.errors import InputError
from sparing.files import atomic_write

FILTERS = 32
WINDOW, STRIDE = 0.025, 0.010
"""Seconds of a window, and seconds from one to the next."""

WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE = len(WORDS), len(WORDS) + 1
NOISE = "_background_noise_"
SPEECH_COMMANDS_PAGE = "https://www.tensorflow.org/datasets/catalog/speech_commands"
FSDD_PAGE = "https://github.com/Jakobovski/free-spoken-digit-dataset"


@dataclass(frozen=True)
class Clip:
    """A stretch of a wav file.

    Attributes:
        path: the file.
        start: first sample.
        samples: how many at most.
        fill: put zeros after the end of the file until there are as many.
        volume: what they are multiplied by.
    """

    path: Path
    start: int
    samples: int
    fill: bool
    volume: float = 1.0


def google12(root: str = "data/speech_commands", cache: str | None = None) -> SequenceData:
    """Google-12: ten words, "unknown" and "silence", one second at 16 kHz, 99 steps × 32.

    Classes 0 to 9 are `WORDS`, 10 any other word, 11 no word. To the ten words of each part come a
    tenth as many unknown ones and a tenth as many silences. (The FastGRNN paper has 22,246 examples to
    train on and 3,081 to test, of version 1; not checked here.) Speakers are in one part only: the
    archive's lists say which, or the rule by which they were made. Silences are stretches of the
    archive's noise at a volume drawn between 0 and 1, from the first 80 % of each noise file for
    training, the next 10 % for validation, the last for the test.
    Each filter is normalised on the training part.

    Args:
        root: the unpacked archive: a folder a word, and `_background_noise_`.
        cache: the file to keep the spectra in; left out, `google12.safetensors` in `root`.

    Raises:
        InputError: a folder, a list or a recording in a list is missing; a file is no 16-bit mono wav of
            16 kHz; the cache cannot be written; kaldi-native-fbank is not installed.

    Source: Warden, "Speech Commands", 2018; the mixture follows the speech_commands example of TensorFlow,
    which picks unknown words by chance where this takes the smallest SHA-1 of their names.
    """
    folder = Path(root)
    absent = [name for name in (*WORDS, NOISE) if not (folder / name).is_dir()]
    if absent:
        raise InputError(
            f"data google12: {folder} lacks the folder {absent[0]!r} ({len(absent)} of {len(WORDS) + 1} are missing); "
            f"unpack speech_commands_v0.01.tar.gz ({SPEECH_COMMANDS_PAGE}) and name its folder with data.root"
        )
    clips: dict[str, list[tuple[Clip, int]]] = {"train": [], "validation": [], "test": []}
    others: dict[str, list[Path]] = {part: [] for part in clips}
    part_of = _speech_commands_parts(folder)
    for path in sorted(folder.glob("*/*.wav")):
        word = path.parent.name
        if word == NOISE:
            continue
        part = part_of(path)
        if word in WORDS:
            clips[part].append((Clip(path, 0, 16_000, True), WORDS.index(word)))
        else:
            others[part].append(path)
    noises = sorted((folder / NOISE).glob("*.wav"))
    if not noises:
        raise InputError(f"data google12: {folder / NOISE} holds no .wav file; unpack the archive again")
    for part, examples in clips.items():
        count = math.ceil(len(examples) / 10)
        chosen = sorted(others[part], key=lambda path: hashlib.sha1(_relative(path).encode()).hexdigest())[:count]
        examples += [(Clip(path, 0, 16_000, True), UNKNOWN) for path in chosen]
        examples += [(clip, SILENCE) for clip in _silences(noises, part, count)]
    return _spectra("google12", clips, 16_000, Path(cache) if cache else folder / "google12.safetensors", 12)


def spoken_digits(root: str = "data/fsdd", cache: str | None = None) -> SequenceData:
    """The Free Spoken Digit Dataset: ten digits by six speakers at 8 kHz, as long as they are, up to a second.

    Recordings 0 to 4 of each speaker and digit are the test part, as its authors have it, 5 to 9 the
    validation part, the others the training part. Each filter is normalised on the training part.

    Args:
        root: the folder with `recordings`, or that folder itself.
        cache: the file to keep the spectra in; left out, `spoken_digits.safetensors` in `root`.

    Raises:
        InputError: there are no recordings, or a digit is missing where there are others of its speaker
            and number; a file is no 16-bit mono wav of 8 kHz; the cache cannot be written;
            kaldi-native-fbank is not installed.

    Source: Jackson et al., https://github.com/Jakobovski/free-spoken-digit-dataset.
    """
    folder = Path(root)
    named = re.compile(r"([0-9])_(\w+)_(\d+)\.wav")
    clips: dict[str, list[tuple[Clip, int]]] = {"train": [], "validation": [], "test": []}
    spoken: dict[tuple[str, int], set[int]] = {}
    recordings = folder / "recordings" if (folder / "recordings").is_dir() else folder
    for path in sorted(recordings.glob("*.wav")):
        match = named.fullmatch(path.name)
        if match is None:
            raise InputError(f"data {path}: is not named digit_speaker_number.wav, as those of {FSDD_PAGE} are")
        digit, number = int(match[1]), int(match[3])
        part = "test" if number < 5 else "validation" if number < 10 else "train"
        clips[part].append((Clip(path, 0, 8_000, False), digit))
        spoken.setdefault((match[2], number), set()).add(digit)
    if not all(clips.values()):
        raise InputError(
            f"data spoken_digits: {folder} holds {sum(map(len, clips.values()))} recordings, which is not all; get "
            f"them from {FSDD_PAGE} and name their folder with data.root"
        )
    for (speaker, number), digits in spoken.items():
        for digit in set(range(10)) - digits:
            raise InputError(
                f"data spoken_digits: {recordings / f'{digit}_{speaker}_{number}.wav'} is missing, of the ten digits "
                f"of a round; get all recordings from {FSDD_PAGE}"
            )
    return _spectra("spoken_digits", clips, 8_000, Path(cache) if cache else folder / "spoken_digits.safetensors", 10)


def log_mel(samples: Tensor, rate: int) -> Tensor:
    """The log-mel spectrum of a recording: (n,) at `rate` per second → (steps, 32).

    steps = ⌈(n − window) / stride⌉ + 1, with zeros to fill the last window: 99 for one second at 16 kHz.
    Hann windows, pre-emphasis 0.97, natural logarithm of power; no dither, so the same every time.

    Raises:
        InputError: there are no samples; kaldi-native-fbank is not installed.

    Examples:
        >>> log_mel(torch.zeros(16_000), 16_000).shape
        torch.Size([99, 32])
    """
    try:
        from kaldi_native_fbank import FbankOptions, OnlineFbank
    except ImportError as error:
        raise InputError("spectra of speech need kaldi-native-fbank: pip install kaldi-native-fbank") from error
    if not len(samples):
        raise InputError("a recording without samples has no spectrum")
    window, stride = round(WINDOW * rate), round(STRIDE * rate)
    steps = max(0, -(-(len(samples) - window) // stride)) + 1
    options = FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.dither = 0
    options.frame_opts.window_type = "hanning"
    options.mel_opts.num_bins = FILTERS
    extractor = OnlineFbank(options)
    padded = torch.nn.functional.pad(samples, (0, (steps - 1) * stride + window - len(samples)))
    extractor.accept_waveform(rate, padded.tolist())
    extractor.input_finished()
    return torch.stack([torch.from_numpy(extractor.get_frame(step).copy()) for step in range(steps)])


def read_wav(path: Path, rate: int) -> Tensor:
    """The samples of a 16-bit mono wav file, as float32 in units of the integers, (n,).

    Raises:
        InputError: it is of another rate or kind, empty, or damaged.
    """
    try:
        with wave.open(str(path), "rb") as file:
            found = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            raw, promised = file.readframes(file.getnframes()), file.getnframes()
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"data {path}: is no readable wav file ({error or 'it ends early'})") from error
    if found != (rate, 1, 16):
        raise InputError(
            f"data {path}: has {found[0]} samples a second, {found[1]} channel(s) of {found[2]} bits; wanted are "
            f"{rate}, 1 and 16"
        )
    if len(raw) != 2 * promised or not raw:
        raise InputError(f"data {path}: holds {len(raw) // 2} of the {promised} samples that it promises")
    return torch.frombuffer(bytearray(raw), dtype=torch.int16).float()


def which_part(name: str, validation: float = 10.0, testing: float = 10.0) -> str:
    """The part of a Speech Commands recording by its file name: the rule of the archive's README.

    Everything up to `_nohash_` is the speaker, whose SHA-1 decides.

    Args:
        name: of the file, such as "0a7c2a8d_nohash_0.wav".
        validation: percentage of validation.
        testing: percentage of the test.

    Examples:
        >>> which_part("0a7c2a8d_nohash_0.wav") == which_part("0a7c2a8d_nohash_4.wav")
        True
    """
    most = 2**27 - 1
    speaker = re.sub(r"_nohash_.*$", "", name)
    share = (int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % (most + 1)) * (100.0 / most)
    return "validation" if share < validation else "test" if share < testing + validation else "train"


def _speech_commands_parts(folder: Path) -> Callable[[Path], str]:
    files = {"validation": folder / "validation_list.txt", "test": folder / "testing_list.txt"}
    there = [path for path in files.values() if path.is_file()]
    if not there:
        return lambda path: which_part(path.name)
    if len(there) == 1:
        (absent,) = set(files.values()) - set(there)
        raise InputError(f"data google12: {absent} is missing, beside {there[0].name}; unpack the archive again")
    listed = {line: part for part, path in files.items() for line in path.read_text(encoding="utf-8").split()}
    missing = [line for line in listed if not (folder / line).is_file()]
    if missing:
        raise InputError(
            f"data google12: {folder / missing[0]} is missing ({len(missing)} of the {len(listed)} recordings that the "
            "lists name are); unpack the archive again"
        )
    return lambda path: listed.get(_relative(path), "train")


def _relative(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _silences(noises: Sequence[Path], part: str, count: int) -> list[Clip]:
    """Seconds of noise, each from the stretch of its file that belongs to the part."""
    begin, end = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}[part]
    lengths = [len(read_wav(path, 16_000)) for path in noises]
    generator = torch.Generator().manual_seed({"train": 0, "validation": 1, "test": 2}[part])
    clips = []
    for index in range(count):
        length = lengths[index % len(noises)]
        where, volume = torch.rand(2, generator=generator).tolist()
        first, last = round(begin * length), max(round(end * length) - 16_000, round(begin * length))
        clips.append(Clip(noises[index % len(noises)], first + round(where * (last - first)), 16_000, True, volume))
    return clips


def _spectra(
    name: str, clips: Mapping[str, Sequence[tuple[Clip, int]]], rate: int, cache: Path, num_classes: int
) -> SequenceData:
    """The clips as a data set, from the cache if it holds the spectra of just these."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    described = [
        (part, _relative(clip.path), clip.path.stat().st_size, clip.start, clip.samples, clip.fill, clip.volume)
        for part, examples in clips.items()
        for clip, _ in examples
    ]
    key = hashlib.sha256(repr((1, rate, FILTERS, WINDOW, STRIDE, described)).encode()).hexdigest()
    tensors: dict[str, Tensor] = {}
    if cache.is_file():
        try:
            with safe_open(cache, "pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    tensors = {entry: file.get_tensor(entry) for entry in file.keys()}  # noqa: SIM118, no dict
        except (OSError, SafetensorError):
            pass  # damaged: made anew
    if not tensors:
        for part, examples in clips.items():
            if not examples:
                raise InputError(f"data {name}: the {part} part is empty; unpack the archive again")
        for part, examples in clips.items():
            spectra = [log_mel(_cut(clip, rate), rate) for clip, _ in examples]
            tensors[f"{part}.values"] = torch.nn.utils.rnn.pad_sequence(spectra, batch_first=True)
            tensors[f"{part}.lengths"] = torch.tensor([len(spectrum) for spectrum in spectra])
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache) as temporary:
                save_file(tensors, temporary, {"key": key})
        except OSError as error:
            raise InputError(
                f"data {name}: the spectra cannot be kept in {cache} ({error.strerror}); name another file with "
                "data.cache"
            ) from error
    parts = []
    for part, examples in clips.items():
        labels = torch.tensor([label for _, label in examples])
        values, lengths = tensors[f"{part}.values"], tensors[f"{part}.lengths"]
        same = bool((lengths == values.shape[1]).all())
        parts.append(Sequences(values, labels, None if same else lengths))
    return normalized(name, parts[0], parts[1], parts[2], num_classes)


def _cut(clip: Clip, rate: int) -> Tensor:
    samples = clip.volume * read_wav(clip.path, rate)[clip.start : clip.start + clip.samples]
    return torch.nn.functional.pad(samples, (0, clip.samples - len(samples))) if clip.fill else samples
