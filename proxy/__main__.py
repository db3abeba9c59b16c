"""`python -m proxy` is `estimate-proxy`."""

from proxy.cli.commands import main

if __name__ == "__main__":
    main()
