"""The browser fixture reports what a page does."""

from browser import Browser

PAGE = (
    'data:text/html,<body><button onclick="this.textContent=innerWidth">press</button>'
    "<p hidden>hidden<p>shown<script>throw Error('a mistake')</script>"
)


def test_a_page_can_be_read_and_its_errors_are_seen(browser: Browser) -> None:
    browser.open(PAGE)
    assert browser.text("p") == "shown"
    browser.resize(360, 640)
    browser.click("button")
    browser.wait_for_text("button", "360")
    browser.prefer(prefers_color_scheme="dark")
    assert browser.run("return matchMedia('(prefers-color-scheme: dark)').matches")
    (error,) = browser.errors()
    assert "a mistake" in error
    assert browser.errors() == []
