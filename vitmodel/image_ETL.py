"""Run `vitmodel etl` from a checkout that is not installed: `python vitmodel/image_ETL.py ...`."""

if __name__ == "__main__":
    import sys

    sys.path[0] = __file__.rsplit("/", 2)[0]
    from vitmodel.cli import main

    sys.exit(main(["etl", *sys.argv[1:]]))
