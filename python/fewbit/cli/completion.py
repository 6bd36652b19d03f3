"""Print a completion script for bash, zsh or fish."""

from __future__ import annotations

from . import Result

USAGE = "{bash,zsh,fish}"
EXAMPLE = 'eval "$(fewbit completion bash)"'
BASH = """\
_fewbit() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" words=
  case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
    1:*) words="{commands}" ;;
{cases}
  esac
  COMPREPLY=()
  [[ $word == -* || $COMP_CWORD == 1 ]] && COMPREPLY=($(compgen -W "$words" -- "$word"))
  [[ $word != -* && $COMP_CWORD != 1 ]] && COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _fewbit fewbit"""


def arguments(parser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help=USAGE)


def run(options) -> Result:
    text = {"bash": _bash, "zsh": _zsh, "fish": _fish}[options.shell]()
    return Result({"shell": options.shell, "script": text}, text)


def _commands() -> dict[str, tuple[str, list]]:
    """By command: its help, and its options as argparse has them."""
    from . import build_parser

    subs = next(a for a in build_parser()._actions if a.dest == "command")
    helps = {choice.dest: choice.help for choice in subs._choices_actions}
    return {
        name: (helps[name], [a for a in sub._actions if a.option_strings])
        for name, sub in subs.choices.items()
    }


def _bash() -> str:
    commands = _commands()
    cases = []
    for name, (_, actions) in commands.items():
        words = " ".join(flag for action in actions for flag in action.option_strings)
        cases.append(f'    *:{name}) words="{words}" ;;')
    return BASH.format(commands=" ".join(commands), cases="\n".join(cases))


def _zsh() -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash()}"


def _fish() -> str:
    lines = []
    for name, (text, actions) in _commands().items():
        lines.append(f"complete -c fewbit -n __fish_use_subcommand -a {name} -d {_quote(text)}")
        for action in actions:
            long = [f"-l {f[2:]}" for f in action.option_strings if f.startswith("--")]
            short = [f"-s {f[1:]}" for f in action.option_strings if not f.startswith("--")]
            words = " ".join((*short, *long, f"-d {_quote(action.help or '')}"))
            lines.append(f"complete -c fewbit -n '__fish_seen_subcommand_from {name}' {words}")
    return "\n".join(lines)


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
