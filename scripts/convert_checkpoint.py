#!/usr/bin/env python3
"""Converts a checkpoint to native weights, as `max-conv convert` does: python scripts/convert_checkpoint.py --help."""

import sys

from max_conv.cli import main

if __name__ == "__main__":
    main.main(["convert", *sys.argv[1:]], prog_name="max-conv")
