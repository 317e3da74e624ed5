"""Pages that mkdocs makes: executed tutorials, and the API reference from the docstrings."""

import pathlib

import griffe
import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = pathlib.Path(__file__).parents[1]
PARTIAL = "functools.partial"
KERNEL = Config(KernelManager={"transport": "ipc"})


def on_config(config: MkDocsConfig) -> None:
    """Leaves out guide pages that are not there, and adds the API reference to the navigation."""
    (guide,) = (section["Guide"] for section in config.nav if "Guide" in section)
    guide[:] = [page for page in guide if (ROOT / "docs" / next(iter(page.values()))).exists()]
    config.nav.append({"API reference": [{name: f"api/{name}.md"} for name in _modules()]})


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds a page for each public module, and the output of its code to each tutorial."""
    for name in _modules():
        page = f"# {name}\n\n::: {name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=page))
    for file in [file for file in files if file.src_uri.startswith("tutorials/")]:
        notebook = jupytext.reads(file.content_string, fmt="md")
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        NotebookClient(notebook, config=KERNEL, timeout=600, coalesce_streams=True).execute()
        source = file.src_uri.replace(".md", ".ipynb")
        link = f"[Download this page as a notebook.]({pathlib.PurePath(source).name})"
        title, text = "\n\n".join(map(_markdown, notebook.cells)).split("\n", 1)
        page = "\n\n".join([title, link, text])
        files.remove(file)
        files.append(File.generated(config, file.src_uri, content=page))
        files.append(File.generated(config, source, content=nbformat.writes(notebook)))


class Docstrings(griffe.Extension):
    """Tells griffe what it does not know of this library."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Renames the section "Example:" to the one that griffe knows."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_class_instance(self, *, cls: griffe.Class, **kwargs: object) -> None:
        """Marks Linen modules as the dataclasses that they are: their fields are arguments."""
        if [str(base) for base in cls.bases] == ["nn.Module"]:
            decorator = griffe.ExprName("dataclasses.dataclass")
            cls.decorators.append(griffe.Decorator(decorator, lineno=None, endlineno=None))

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        """Documents the networks that are a class with arguments given."""
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == PARTIAL:
            text = "Constructs the network of that name; takes the other arguments of its class."
            attr.docstring = attr.docstring or griffe.Docstring(text, parent=attr)


def _modules() -> list[str]:
    """Names of the packages below wsbcn_flax and of their modules that are public."""
    paths = (file.relative_to(ROOT).with_suffix("") for file in ROOT.glob("wsbcn_flax/*/**/*.py"))
    names = (".".join(path.parts).removesuffix(".__init__") for path in paths)
    return sorted(name for name in names if "._" not in name)


def _markdown(cell: nbformat.NotebookNode) -> str:
    if cell.cell_type == "markdown":
        return cell.source
    parts = [f"```python\n{cell.source}\n```"]
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            parts.append(f"![Figure](data:image/png;base64,{data['image/png'].strip()})")
        else:
            text = output.get("text") or data["text/plain"]
            parts.append(f'```{{ .text .output title="Output" }}\n{text.rstrip()}\n```')
    return "\n\n".join(parts)
