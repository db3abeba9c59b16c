"""The group of all commands.

* Each command is imported when it is used: `serve` stays in memory as the supervisor, and needs neither the application
  nor the client of the store.
* Bad input is one clear line per problem on standard error, and exit status 2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from proxy import __version__
from proxy.cli.inputs import fail

COMMANDS = ("check", "demo", "explain", "learned", "prices", "purge", "quota", "quote", "serve", "token", "usage")
"""Each is a function in the module of its name."""


class _Commands(click.Group):
    """Imports a command when it is used, and reports bad usage as any other bad input."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in COMMANDS:  # click itself suggests only commands that are imported
            raise click.exceptions.NoSuchCommand(cmd_name, possibilities=COMMANDS, ctx=ctx)
        command: click.Command = getattr(import_module(f"proxy.cli.{cmd_name}"), cmd_name)
        return command

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _bad_usage_in_one_line():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _bad_usage_in_one_line():
            return super().invoke(ctx)


@contextmanager
def _bad_usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        fail(" ".join(error.format_message().split()) + hint)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="estimate-proxy")
def main() -> None:
    """A shared gateway for RenderNet price estimates.

    Teams use their own tokens. The gateway uses the organisation's RenderNet key, and asks for each price only once.
    """
