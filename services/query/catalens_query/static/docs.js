/** The API reference, drawn from the server's own /openapi.json by the vendored Swagger UI. */

/** @type {any} the classic script before this module puts it there */
const SwaggerUIBundle = Reflect.get(window, "SwaggerUIBundle");

// Swagger UI has a dark theme but leaves it to the page to turn it on.
const dark = matchMedia("(prefers-color-scheme: dark)");
const applyTheme = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", applyTheme);
applyTheme();

SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#reference",
  deepLinking: true,
  defaultModelsExpandDepth: 0,
  displayRequestDuration: true,
  docExpansion: "list",
  filter: false,
  requestSnippetsEnabled: true,
  tryItOutEnabled: true,
  // The badge would send the document to a service on the web.
  validatorUrl: null,
});
