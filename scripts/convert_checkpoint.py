#!/usr/bin/env python3
"""Converts a checkpoint to native weights, as `max-conv convert` does: python scripts/convert_checkpoint.py --help."""

import sys

from max_conv.cli_convert import convert
from max_conv.terminal import Commands

if __name__ == "__main__":
    Commands("max-conv", commands={"convert": convert})(["convert", *sys.argv[1:]])
