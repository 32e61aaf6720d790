"""Command lines: types of numbers, which argparse checks and shows in --help."""
import argparse
import functools
import math


def make_parser(doc, epilog=None):
    """An ArgumentParser that describes a program by the first paragraph of its docstring and shows flags' types."""
    formatter = functools.partial(argparse.MetavarTypeHelpFormatter, max_help_position=26)
    return argparse.ArgumentParser(description=doc.split("\n\n")[0], epilog=epilog, usage="%(prog)s [flags]",
                                   formatter_class=formatter)


def positive(text):
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def not_negative(text):
    """A finite number, at least 0."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return value


def fraction(text):
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to 1")
    return value


def below_one(text):
    """A number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to below 1")
    return value


def count(text):
    """A whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return value


def natural(text):
    """A whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 on")
    return value
