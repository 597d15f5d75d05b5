"""The strategies and searchers that come with widthkit, written as a stranger would write them."""
