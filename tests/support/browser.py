"""A headless Chromium for tests of pages. Debian's packages are chromium and chromium-driver."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement

from programs import program
from serving import wait_until

_UNTESTED = "pages were not opened in a browser"


class Browser:
    """One tab. Methods that take a CSS selector wait until something matches it."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def run(self, script: str, *arguments: object) -> Any:
        """The value that `script`, the body of a function, returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, css: str) -> WebElement:
        """The first element that matches and is visible."""
        found: list[WebElement] = []

        def appears() -> bool:
            found[:] = [element for element in self.driver.find_elements("css selector", css) if element.is_displayed()]
            return bool(found)

        wait_until(appears)
        return found[0]

    def text(self, css: str) -> str:
        return self.find(css).text

    def click(self, css: str) -> None:
        self.find(css).click()

    def wait_for_text(self, css: str, text: str) -> None:
        """Waits until the first element that matches has `text` in its text."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        wait_until(lambda: text in self.run(script, css))

    def resize(self, width: int, height: int) -> None:
        """Sets the size of the page in CSS pixels. A window cannot be narrower than 500."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, **features: str) -> None:
        """Sets media features, such as `prefers_color_scheme="dark"`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    def errors(self) -> list[str]:
        """The console's errors since the last call: exceptions, what a CSP has blocked, and failed requests."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chrome]:
    """One browser for all tests of a process: starting it takes a second."""
    options = ChromeOptions()
    options.binary_location = program("chromium", _UNTESTED)
    for argument in (
        "--headless=new",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--no-first-run",
        "--no-proxy-server",
    ):
        options.add_argument(argument)
    if os.getuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options, Service(program("chromedriver", _UNTESTED)))
    driver.set_script_timeout(120)  # a busy machine is slow
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Chrome) -> Iterator[Browser]:
    """A new tab: it has no storage of earlier tests."""
    first = chromium.current_window_handle
    chromium.switch_to.new_window("tab")
    tab = Browser(chromium)
    tab.errors()
    yield tab
    chromium.close()
    chromium.switch_to.window(first)
