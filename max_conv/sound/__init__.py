"""The inputs and results of the networks: sound files, speech turns, pitch tracks, and pictures of them."""

from .audio import as_signals, check_sound_file, read_audio, write_audio
from .pcm import read_pcm, to_pcm
from .picture import draw_pitch, draw_speech
from .pitch import Pitch, Track, note, stretches, viterbi
from .speech import Turn, agreement, read_rttm, turns

__all__ = [
    "Pitch",
    "Track",
    "Turn",
    "agreement",
    "as_signals",
    "check_sound_file",
    "draw_pitch",
    "draw_speech",
    "note",
    "read_audio",
    "read_pcm",
    "read_rttm",
    "stretches",
    "to_pcm",
    "turns",
    "viterbi",
    "write_audio",
]
