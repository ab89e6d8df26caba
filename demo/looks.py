"""How the page looks: a palette of its own, the fonts of the system, one style sheet, light and dark.

    theme()     gr.themes.Base with our colours; nothing is fetched
    css()       demo/assets/*.css, joined
    HEAD        what stands in the <head>

Dark and light follow the system (prefers-color-scheme): Gradio sets the class `dark`, and our sheets use its variables.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio as gr

ASSETS = Path(__file__).parent / "assets"
SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

HEAD = """
<meta name="color-scheme" content="light dark">
<meta name="description" content="Chat with a model about pictures and clips, and see what it saw.">
"""

# from light to dark: a blue of dusk, and greys with a little of it
DUSK = "#f1f5fb #e1e9f6 #c5d4ec #9fb6de #7896cd #5679b8 #4263a0 #365084 #2e4269 #26344f #182236".split()
STONE = "#f7f8fa #eff1f4 #e2e5ea #cdd2da #9aa3b0 #6d7684 #515a67 #3c434e #272c35 #1b1f26 #12151a".split()


def theme() -> "gr.themes.Base":
    """The theme. Fonts are plain names: Gradio would fetch any other kind."""
    import gradio as gr

    def color(name: str, shades: list[str]) -> "gr.themes.Color":
        return gr.themes.Color(*shades, name=name)

    base = gr.themes.Base(
        primary_hue=color("dusk", DUSK),
        secondary_hue=color("dusk", DUSK),
        neutral_hue=color("stone", STONE),
        radius_size=gr.themes.sizes.radius_md,
        text_size=gr.themes.sizes.text_md,
        font=list(SANS),
        font_mono=list(MONO),
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        background_fill_secondary="*neutral_100",
        background_fill_secondary_dark="*neutral_800",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        border_color_primary="*neutral_200",
        border_color_primary_dark="*neutral_700",
        input_background_fill="white",
        input_background_fill_dark="*neutral_800",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_border_color_focus="*primary_600",
        input_border_color_focus_dark="*primary_400",
        input_border_width="1px",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_500",
        input_shadow="none",
        input_shadow_focus="none",
        button_secondary_background_fill="white",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover="*neutral_100",
        button_secondary_background_fill_hover_dark="*neutral_700",
        button_secondary_border_color="*neutral_300",
        button_secondary_border_color_dark="*neutral_600",
        button_secondary_text_color="*neutral_800",
        button_secondary_text_color_dark="*neutral_100",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="white",
        button_cancel_background_fill="white",
        button_cancel_background_fill_dark="*neutral_800",
        button_cancel_background_fill_hover="#fbeeea",
        button_cancel_background_fill_hover_dark="#46291f",
        button_cancel_border_color="*neutral_300",
        button_cancel_border_color_dark="*neutral_600",
        button_cancel_text_color="#a33d19",
        button_cancel_text_color_dark="#f2a184",
        button_border_width="1px",
        color_accent="*primary_600",
        color_accent_soft="*primary_50",
        color_accent_soft_dark="*primary_900",
        link_text_color="*primary_700",
        link_text_color_dark="*primary_300",
        checkbox_background_color_selected="*primary_600",
        checkbox_background_color_selected_dark="*primary_500",
        slider_color="*primary_600",
        slider_color_dark="*primary_400",
    )


def css() -> str:
    """All style sheets of the page, by name."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob("*.css")))
