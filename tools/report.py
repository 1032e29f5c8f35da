"""Write the page of a training run anew: ``report.html`` from what its directory holds."""

import argparse

from mmsora.utils.user_error import user_errors_as_one_line


def main(argv: list[str] | None = None) -> None:
    """Write it."""
    parser = argparse.ArgumentParser(
        description="Write WORK_DIR/report.html anew; training keeps it up to date by itself."
    )
    parser.add_argument("work_dir", help="directory of a run")
    args = parser.parse_args(argv)
    with user_errors_as_one_line():
        from mmsora.visualization.run_report import write_run_report

        print(write_run_report(args.work_dir))


if __name__ == "__main__":
    main()
