"""The command line of the fuzzers in tests/long."""

import argparse


def fuzz_arguments(description: str, cases: str, count: int) -> tuple[argparse.Namespace, range]:
    """Flags of a fuzzer, and the numbers of its cases.

    Args:
        cases: what is counted, as the flag is called. count: of them where the flag is left out.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(f"--{cases}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    args = parser.parse_args()
    if args.only is not None:
        return args, range(args.only, args.only + 1)
    return args, range(args.first, args.first + getattr(args, cases))
