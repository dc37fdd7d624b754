"""Models of other libraries as the timm models that compute the same."""
