"""Hostile requests against the running page."""


def add_arguments(parser):
    parser.set_defaults(run=lambda args: 0)
